//! Who fetches which chunk from whom, and when: sans-IO.
//!
//! [`Swarm`] knows no clock, socket, file, thread or entropy. Its owner tells it what happened and does what it says.
//!
//! # Calling contract
//!
//! - `now` is the time since an epoch of the owner's choice and never goes back.
//! - After any sequence of calls that change something (`add_*`, `remove_*`, `want`, `cancel_want`, `on_*`,
//!   `handle_timeout`), call [`Swarm::poll_action`] until it gives `None`, doing each [`Action`], then wait for the next
//!   event or for [`Swarm::poll_timeout`], whichever is first. When that time has come, call [`Swarm::handle_timeout`].
//! - Each [`Action::Fetch`] is answered by exactly one [`Swarm::on_end`], also after an [`Action::Cancel`]; calls about a
//!   fetch that the swarm no longer knows are ignored. [`Swarm::on_chunk`] comes before the `on_end` of its fetch.
//! - The swarm does not know which chunks are here: its owner wants only missing ones, and reports with
//!   [`Swarm::on_here`] a chunk that came in another way.
//!
//! # Where things are
//!
//! - [`Swarm`]: the calls above; keeps the books consistent.
//! - `book`: the wants of one layer and its fetches (bookkeeping).
//! - `picker`: which source, which run, whether now (policy).
//! - `source`: rest after blame, bytes in flight and speed of one source.
//! - `timer`: what will happen when nothing else does.

mod book;
mod config;
mod picker;
mod source;
mod swarm;
mod timer;

pub use config::Config;
pub use swarm::{Action, FetchId, LayerKey, Outcome, Priority, Reason, SourceId, SourceKind, Swarm, Verdict};
