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
//! # A layer that nodes give each other
//!
//! [`Swarm::open_mesh`] makes a layer one of a *mesh*. Then, besides the above:
//!
//! - Whoever a seeder introduces is added with [`Swarm::add_peer`] and told all of [`Swarm::have`]; what it tells goes to
//!   [`Swarm::on_haves`]. [`Swarm::remove_source`] when its connection is gone.
//! - What a reader will want who goes through the layer in order goes to [`Swarm::read_on`].
//! - What a seeder assigns goes to [`Swarm::assign`]; the loss of its connection to [`Swarm::on_source_lost`], any other sign
//!   of life to [`Swarm::on_alive`].
//! - After [`Swarm::poll_action`] gave `None`, each [`Message`] of [`Swarm::poll_message`] is sent.
//! - A request of a peer is admitted by [`Uploads`], at a seeder by [`Tracker::request`]. Whom a busy seeder names is added
//!   with [`Swarm::add_peer`], and what it was named for goes to [`Swarm::on_haves`].
//!
//! A seeder drives a [`Tracker`] in the same way: calls, then [`Tracker::poll_action`] until `None`, and
//! [`Tracker::handle_timeout`] when [`Tracker::poll_timeout`] says so.
//!
//! # Where things are
//!
//! - [`Swarm`]: the calls above; keeps the books consistent.
//! - `book`: the wants of one layer and its fetches (bookkeeping).
//! - `picker`: which source, which run, whether now (policy).
//! - `source`: rest after blame, bytes in flight and speed of one source.
//! - `mesh`: one layer among neighbours: haves, assignments, whom to ask (policy), what to tell.
//! - `company`: readers in step share what is read ahead (policy).
//! - `delegates`: who asks the registry when all seeders are gone.
//! - `hedging`: when a neighbour is late, and the budget for asking twice.
//! - `uploads`: whether a request of a peer is served now.
//! - `tracker`: the seeder's part: introductions, first copies, zones.
//! - `rate`, `chunk_set`, `peer`: a limit of bytes per second, chunks as bits, names of machines.
//! - `timer`: what will happen when nothing else does.

mod book;
mod chunk_set;
mod company;
mod config;
mod delegates;
mod hedging;
mod mesh;
mod peer;
mod picker;
mod rate;
mod source;
mod swarm;
mod timer;
mod tracker;
mod uploads;

pub use chunk_set::ChunkSet;
pub use config::Config;
pub use delegates::Delegate;
pub use mesh::Message;
pub use peer::{PeerId, Zone};
pub use rate::Rate;
pub use swarm::{Action, FetchId, LayerKey, Outcome, Priority, Reason, SourceId, SourceKind, Swarm, Verdict};
pub use tracker::{Answer, Newcomer, Tracker, TrackerAction, TrackerConfig};
pub use uploads::{Admission, UploadConfig, Uploads};
