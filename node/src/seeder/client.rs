//! The configured seeders. Each blob lies with one of them; those that failed lately are asked last.

mod feed;
mod grants;
mod sections;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use layer::Digest;
use layer::index::{Header, Section};
use parking_lot::Mutex;
use proto::drover::control::v1::control_client::ControlClient;
use proto::drover::control::v1::{ResolveEvent, ResolveRequest, resolve_event};
use proto::drover::enrol::v1::enrolment_client::EnrolmentClient;
use proto::drover::enrol::v1::{Certificate, EnrolRequest, RenewRequest};
use rustls_pki_types::ServerName;
use tonic::transport::{Channel, Endpoint};

use crate::bulk::{Body, Bulk, Fault, REASON_BYTES_MAX};
use crate::config::SeederAddresses;
use crate::connect::{Connector, NO_ENROLMENT};
use crate::grant::Held;
use crate::ingest::Progress;
use crate::mesh::{OwnAddress, Turned};
use crate::security::token::Token;
use crate::security::{Role, Security, Signed, tls};
use crate::source::{BlobRef, Priority, SourceError};

pub(crate) use self::feed::Feed;
use self::grants::Seeders;
pub use crate::bulk::Options;

/// How long a resolved host name is used.
const NAME_AGE_MAX: Duration = Duration::from_secs(30);
/// The most addresses of one host name that are used.
const ADDRESSES_MAX: usize = 16;
/// Rest of a seeder after a failure; it doubles up to [`REST_MAX`].
const REST: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(30);
/// The same without a line to it: longer than it takes to try for one again.
const LINE_REST: Duration = Duration::from_secs(15);
/// What a seeder gives in less than this is no sign that it will give a chunk in time.
const MOVED_MIN: usize = 16 << 10;
/// Who waits for a seeder while another one works asks it so often whether it lives, waits as long for that, and gives it up when it
/// does not answer [`SIGNS`] times in a row.
const QUIET: Duration = Duration::from_secs(1);
const SIGNS: u32 = 2;
/// Largest event of a resolve: a header, a signature and a few certificates.
const EVENT_BYTES_MAX: usize = 256 << 10;

/// Why a seeder did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeederError {
    /// None is configured, or none of their names resolves.
    #[error("no seeder: {0}")]
    None(String),
    /// No connection, or it broke.
    #[error("seeder {seeder}: {reason}")]
    Unreachable {
        /// The seeder.
        seeder: String,
        /// Error text of the transport.
        reason: String,
    },
    /// One end has security on, the other off, or the certificates do not fit.
    #[error("seeder {seeder} and this machine do not trust each other: {reason}")]
    Untrusted {
        /// The seeder.
        seeder: String,
        /// What does not fit.
        reason: String,
    },
    /// It gives the layer only to who shows a grant, and this machine has none that it takes.
    #[error("seeder {seeder} gives this machine nothing of the layer: {reason}")]
    Ungranted {
        /// The seeder.
        seeder: String,
        /// What it answered, and why there is no grant.
        reason: String,
    },
    /// It does not have it.
    #[error("seeder {seeder} does not have it: {reason}")]
    Missing {
        /// The seeder.
        seeder: String,
        /// What it answered.
        reason: String,
    },
    /// It gives this machine nothing for a while: the chunks are on their way through the mesh.
    #[error("seeder {seeder} has enough to do")]
    Busy {
        /// The seeder.
        seeder: String,
        /// What it answered.
        turned: Turned,
    },
    /// It has too much to do.
    #[error("seeder {seeder} is overloaded: {reason}")]
    Overloaded {
        /// The seeder.
        seeder: String,
        /// What it answered.
        reason: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// It does not give this machine a certificate.
    #[error("seeder {seeder} gives no certificate: {reason}")]
    Refused {
        /// The seeder.
        seeder: String,
        /// What it answered.
        reason: String,
    },
    /// No byte or event came for too long.
    #[error("seeder {seeder} sent nothing for {after:?}")]
    Stalled {
        /// The seeder.
        seeder: String,
        /// The limit that expired.
        after: Duration,
    },
    /// Its ingest of the layer failed.
    #[error("seeder {seeder} could not ingest the layer: {reason}")]
    Ingest {
        /// The seeder.
        seeder: String,
        /// What it answered.
        reason: String,
    },
    /// What came cannot be right.
    #[error("seeder {seeder} sent something wrong: {reason}")]
    Wrong {
        /// The seeder.
        seeder: String,
        /// What is wrong.
        reason: String,
    },
}

impl SeederError {
    fn of(seeder: &str, fault: Fault) -> Self {
        let seeder = seeder.to_owned();
        match fault {
            Fault::Unreachable(reason) => Self::Unreachable { seeder, reason },
            Fault::Untrusted(reason) => Self::Untrusted { seeder, reason },
            Fault::Ungranted(reason) => Self::Ungranted { seeder, reason },
            Fault::Missing(reason) => Self::Missing { seeder, reason },
            Fault::Busy(turned) => Self::Busy { seeder, turned },
            Fault::Overloaded { reason, retry_after } => Self::Overloaded { seeder, reason, retry_after },
            Fault::Stalled(after) => Self::Stalled { seeder, after },
            Fault::Wrong(reason) => Self::Wrong { seeder, reason },
        }
    }

    /// The error as that of a source named `source_label`.
    pub fn into_source_error(self) -> SourceError {
        let label = |seeder: String| format!("seeder {seeder}");
        match self {
            Self::None(reason) => SourceError::Unreachable { source_label: "seeder".to_owned(), reason },
            Self::Unreachable { seeder, reason } => SourceError::Unreachable { source_label: label(seeder), reason },
            Self::Untrusted { seeder, reason }
            | Self::Refused { seeder, reason }
            | Self::Ungranted { seeder, reason } => SourceError::Denied { source_label: label(seeder), reason },
            Self::Missing { seeder, reason } => SourceError::Missing { source_label: label(seeder), reason },
            Self::Busy { seeder, turned: Turned { retry_after, peers } } => {
                SourceError::Busy { source_label: label(seeder), retry_after, peers }
            }
            Self::Overloaded { seeder, reason, retry_after } => {
                SourceError::Overloaded { source_label: label(seeder), reason, retry_after }
            }
            Self::Stalled { seeder, after } => SourceError::Stalled { source_label: label(seeder), after },
            Self::Ingest { seeder, reason } => {
                SourceError::Overloaded { source_label: label(seeder), reason, retry_after: None }
            }
            Self::Wrong { seeder, reason } => SourceError::Corrupt { source_label: label(seeder), reason },
        }
    }

    /// Whether it is the seeder that fails, whatever it was asked.
    pub(crate) const fn is_gone(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Stalled { .. })
    }

    /// Whether another seeder may do better although this one answered.
    pub(super) const fn is_elsewhere(&self) -> bool {
        !matches!(self, Self::Wrong { .. } | Self::Ingest { .. } | Self::Busy { .. })
    }
}

/// What a seeder tells of a layer.
#[derive(Clone, Debug)]
pub enum Event {
    /// It is being ingested.
    Progress(Progress),
    /// Its index is complete. Neither header nor signature is verified.
    Ready {
        /// The header.
        header: Box<Header>,
        /// Its signature.
        signed: Signed,
    },
    /// It cannot be lazy.
    Unsupported(String),
}

/// The seeders. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    places: Vec<(String, u16)>,
    local: Option<Arc<Seat>>,
    security: Security,
    options: Options,
    own_address: OwnAddress,
    grants: Held,
    names: Mutex<HashMap<String, LookedUp>>,
    seats: Mutex<HashMap<(String, SocketAddr), Arc<Seat>>>,
}

/// Addresses of a name, and when they were looked up; `None`: they are to be looked up again.
type LookedUp = (Vec<IpAddr>, Option<Instant>);

/// One seeder.
pub(super) struct Seat {
    name: String,
    bulk: Bulk,
    channel: Channel,
    stall: Duration,
    rest: Mutex<Rest>,
    moved: Mutex<Moved>,
}

/// What a seeder last gave of chunks.
struct Moved {
    at: tokio::time::Instant,
    /// Bytes since then.
    bytes: usize,
}

#[derive(Default)]
struct Rest {
    until: Option<Instant>,
    failures: u32,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("seeder::Client").field("places", &self.shared.places).finish_non_exhaustive()
    }
}

impl Client {
    /// A client of the seeders at `addresses`; no network is used yet.
    pub fn new(addresses: &SeederAddresses, security: Security, options: Options) -> Self {
        let places = addresses.iter().map(|(host, port)| (host.to_owned(), port)).collect();
        Self::with(places, None, security, options)
    }

    /// A client of the seeder of this machine that listens on the socket file `path`.
    pub fn local(path: PathBuf, options: Options) -> Self {
        let name = path.display().to_string();
        let connector = Connector::local(path);
        let bulk = Bulk::new(connector.clone(), options.stall_timeout, OwnAddress::default(), None);
        let seat = Seat::new(name, bulk, connector, options);
        Self::with(Vec::new(), Some(Arc::new(seat)), Security::Off, options)
    }

    fn with(places: Vec<(String, u16)>, local: Option<Arc<Seat>>, security: Security, options: Options) -> Self {
        let shared = |myself: &Weak<Shared>| Shared {
            grants: Held::new(Box::new(Seeders(Weak::clone(myself)))),
            places,
            local,
            security,
            options,
            own_address: OwnAddress::default(),
            names: Mutex::default(),
            seats: Mutex::default(),
        };
        Self { shared: Arc::new_cyclic(shared) }
    }

    /// This machine's grants, which go with what it asks for.
    pub fn grants(&self) -> &Held {
        &self.shared.grants
    }

    /// This machine's address in the mesh, which goes with what it asks for; whoever learns it sets it here.
    pub fn own_address(&self) -> &OwnAddress {
        &self.shared.own_address
    }

    /// Asks a seeder for `blob`; one that does not know it begins to ingest it.
    pub async fn resolve(&self, blob: &BlobRef) -> Result<Resolution, SeederError> {
        let request = ResolveRequest {
            blob: blob.digest.to_string(),
            blob_size: blob.size,
            media_type: blob.media_type.clone(),
            urls: blob.urls.clone(),
            registry: blob.registry.clone(),
            repository: blob.repository.clone(),
            wants_digests: self.shared.own_address.is_awaited(),
        };
        if let Security::Mutual(identity) = &self.shared.security {
            identity.settle().await;
        }
        let digest = blob.digest;
        self.first_of(digest, |seat, has_others| {
            let request = request.clone();
            async move {
                let mut control = ControlClient::new(seat.channel.clone()).max_decoding_message_size(EVENT_BYTES_MAX);
                let answer = tokio::time::timeout(seat.stall, control.resolve(request)).await;
                match answer.map_err(|_| seat.stalled())? {
                    Ok(answer) => {
                        let events = answer.into_inner();
                        Ok(Resolution { client: self.clone(), seat, has_others, blob: digest, events, digests: None })
                    }
                    Err(status) => Err(seat.status_error(status).await),
                }
            }
        })
        .await
    }

    /// Fetches a section of the index that `header` names, from whichever seeder has it or names somebody who has. Its digest is
    /// not verified.
    pub async fn section(&self, header: &Header, section: Section) -> Result<Vec<u8>, SeederError> {
        self.first_of(header.blob(), |seat, _| {
            let header = header.clone();
            async move { self.section_by(&seat, &header, section).await }
        })
        .await
    }

    /// Asks a seeder to renew this machine's certificate, for the key that made the request (PKCS #10).
    pub async fn renew(&self, certificate_request: &[u8]) -> Result<Certificate, SeederError> {
        let request = RenewRequest { certificate_request: certificate_request.to_vec() };
        self.first(|seat, _| {
            let (mut enrolment, request) = (EnrolmentClient::new(seat.channel.clone()), request.clone());
            async move {
                let answer = tokio::time::timeout(seat.stall, enrolment.renew(request)).await;
                match answer.map_err(|_| seat.stalled())? {
                    Ok(answer) => Ok(answer.into_inner()),
                    Err(status) => Err(seat.enrolment_error(status).await),
                }
            }
        })
        .await
    }

    /// Asks a seeder of the authority that made `token` for this machine's first certificate.
    pub async fn enrol(
        &self,
        token: &Token,
        certificate_request: &[u8],
        name: &str,
    ) -> Result<Certificate, SeederError> {
        let config = tls::enrolment_client(token.authority(), self.shared.security.clock())
            .map_err(|error| SeederError::None(error.to_string()))?;
        let request = EnrolRequest {
            token: token.to_string(),
            certificate_request: certificate_request.to_vec(),
            name: name.to_owned(),
        };
        let mut last = None;
        for (host, port) in &self.shared.places {
            let addresses = self.addresses(host).await.map_err(SeederError::None)?;
            for address in addresses {
                let address = SocketAddr::new(address, *port);
                let server =
                    ServerName::try_from(host.to_owned()).map_err(|error| SeederError::None(error.to_string()))?;
                let options = self.shared.options;
                let connector = Connector::new(address, Some((Arc::clone(&config), server)), options.connect_timeout);
                let name = seat_name(host, address);
                let bulk = Bulk::new(connector.clone(), options.stall_timeout, OwnAddress::default(), None);
                let seat = Seat::new(name, bulk, connector, options);
                let mut enrolment = EnrolmentClient::new(seat.channel.clone());
                match tokio::time::timeout(seat.stall, enrolment.enrol(request.clone())).await {
                    Ok(Ok(answer)) => return Ok(answer.into_inner()),
                    Ok(Err(status)) => last = Some(seat.enrolment_error(status).await),
                    Err(_) => last = Some(seat.stalled()),
                }
            }
        }
        Err(last.unwrap_or_else(|| SeederError::None("none is configured".to_owned())))
    }

    /// Whether a seeder answers.
    #[cfg(test)]
    pub(crate) async fn is_there(&self) -> Result<(), SeederError> {
        self.first(
            |seat, _| async move { seat.bulk.get("/healthz").await.map(drop).map_err(|fault| seat.error(fault)) },
        )
        .await
    }

    /// The seeders, by name, and a channel to each.
    pub(crate) async fn channels(&self) -> Result<Vec<(String, Channel)>, SeederError> {
        Ok(self.seats().await?.iter().map(|seat| (seat.name.clone(), seat.channel.clone())).collect())
    }

    /// The line of the mesh to a seeder stands, or does not: it is asked as usual, or last for the time being.
    pub(crate) fn note_line(&self, name: &str, stands: bool) {
        let seats = self.shared.seats.lock();
        if let Some(seat) = seats.values().find(|seat| seat.name == name) {
            if stands { seat.praise() } else { seat.rest.lock().until = Some(Instant::now() + LINE_REST) }
        }
    }

    /// Names are looked up anew when they are needed next; where that fails the addresses that are known are used.
    pub(crate) fn look_up_again(&self) {
        for (_, looked_up) in self.shared.names.lock().values_mut() {
            *looked_up = None;
        }
    }

    /// The same as [`Client::first`], beginning with the seeder whose share the blob is.
    pub(super) async fn first_of<T, F: Future<Output = Result<T, SeederError>>>(
        &self,
        blob: Digest,
        work: impl Fn(Arc<Seat>, bool) -> F,
    ) -> Result<T, SeederError> {
        Self::first_among(self.seats_of(blob).await?, work).await
    }

    /// All seeders, those that rest behind those that work, and the one whose share the blob is first of these.
    pub(super) async fn seats_of(&self, blob: Digest) -> Result<Vec<Arc<Seat>>, SeederError> {
        let mut seats = self.seats().await?;
        seats.sort_by_key(|seat| (seat.resting(), Reverse(share(&seat.name, blob))));
        Ok(seats)
    }

    /// Runs `work` with one seeder after the other until one answers. It is told whether there are others that work.
    pub(super) async fn first<T, F: Future<Output = Result<T, SeederError>>>(
        &self,
        work: impl Fn(Arc<Seat>, bool) -> F,
    ) -> Result<T, SeederError> {
        Self::first_among(self.seats().await?, work).await
    }

    async fn first_among<T, F: Future<Output = Result<T, SeederError>>>(
        seats: Vec<Arc<Seat>>,
        work: impl Fn(Arc<Seat>, bool) -> F,
    ) -> Result<T, SeederError> {
        let mut last = None;
        for (place, seat) in seats.iter().enumerate() {
            let has_others = seats.iter().skip(place + 1).any(|other| other.resting().is_none());
            match seat.attend(has_others, work(Arc::clone(seat), has_others)).await {
                Ok(done) => {
                    seat.praise();
                    return Ok(done);
                }
                Err(error) => {
                    seat.judge(&error);
                    let is_elsewhere = error.is_elsewhere();
                    last = Some(error);
                    if !is_elsewhere {
                        break;
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| SeederError::None("none is configured".to_owned())))
    }

    /// All seeders: those that work in the order of the configuration, then those that rest, the longest rested first.
    async fn seats(&self) -> Result<Vec<Arc<Seat>>, SeederError> {
        if let Some(local) = &self.shared.local {
            return Ok(vec![Arc::clone(local)]);
        }
        let mut seats = Vec::new();
        let mut reasons = Vec::new();
        for (host, port) in &self.shared.places {
            match self.addresses(host).await {
                Ok(addresses) => {
                    for address in addresses {
                        match self.seat(host, SocketAddr::new(address, *port)) {
                            Ok(seat) => seats.push(seat),
                            Err(error) => reasons.push(format!("{host}: {error}")),
                        }
                    }
                }
                Err(error) => reasons.push(format!("{host}: {error}")),
            }
        }
        if seats.is_empty() {
            let reason = if reasons.is_empty() { "none is configured".to_owned() } else { reasons.join("; ") };
            return Err(SeederError::None(reason));
        }
        seats.sort_by_key(|seat| seat.resting());
        Ok(seats)
    }

    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let cached = self.shared.names.lock().get(host).cloned();
        if let Some((addresses, at)) = &cached
            && at.is_some_and(|at| at.elapsed() < NAME_AGE_MAX)
        {
            return Ok(addresses.clone());
        }
        let looked_up = tokio::time::timeout(self.shared.options.connect_timeout, tokio::net::lookup_host((host, 0)));
        let fresh = match looked_up.await {
            Ok(Ok(found)) => Ok(found.map(|address| address.ip()).take(ADDRESSES_MAX).collect::<Vec<_>>()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the name is not resolved in time".to_owned()),
        };
        match (fresh, cached) {
            (Ok(addresses), _) if !addresses.is_empty() => {
                self.shared.names.lock().insert(host.to_owned(), (addresses.clone(), Some(Instant::now())));
                Ok(addresses)
            }
            // A name server that is away does not move seeders.
            (_, Some((addresses, _))) => Ok(addresses),
            (Ok(_), None) => Err("the name has no address".to_owned()),
            (Err(error), None) => Err(error),
        }
    }

    fn seat(&self, host: &str, address: SocketAddr) -> Result<Arc<Seat>, String> {
        let key = (host.to_owned(), address);
        if let Some(seat) = self.shared.seats.lock().get(&key) {
            return Ok(Arc::clone(seat));
        }
        let options = self.shared.options;
        let connector = |alpn| -> Result<Connector, String> {
            let tls = match &self.shared.security {
                Security::Off => None,
                Security::Mutual(identity) => {
                    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
                    let config = tls::client(identity, Role::Seeder, alpn).map_err(|error| error.to_string())?;
                    Some((config, name))
                }
            };
            Ok(Connector::new(address, tls, options.connect_timeout))
        };
        let (name, own_address) = (seat_name(host, address), self.shared.own_address.clone());
        let (http1, http2) = (connector(tls::HTTP1)?, connector(tls::HTTP2)?);
        let bulk = Bulk::new(http1, options.stall_timeout, own_address, Some(self.shared.grants.clone()));
        let seat = Arc::new(Seat::new(name, bulk, http2, options));
        let mut seats = self.shared.seats.lock();
        if seats.len() >= 256 {
            seats.clear();
        }
        Ok(Arc::clone(seats.entry(key).or_insert(seat)))
    }
}

/// How much of a claim a seeder has on a blob. All machines compute it alike, and the one with the largest has it: each blob then
/// lies with one seeder, and with the next one when that is gone (rendezvous hashing: Thaler, Ravishankar: A name-based mapping
/// scheme for rendezvous, 1996).
pub fn share(seeder: &str, blob: Digest) -> u64 {
    let hash = blake3::Hasher::new().update(seeder.as_bytes()).update(blob.as_bytes()).finalize();
    hash.as_bytes().iter().take(8).fold(0, |share, byte| share << 8 | u64::from(*byte))
}

/// What errors and the log call a seeder.
fn seat_name(host: &str, address: SocketAddr) -> String {
    match host.parse::<IpAddr>() {
        Ok(_) => address.to_string(),
        Err(_) => format!("{host} ({address})"),
    }
}

/// One seeder's answer to a resolve.
pub struct Resolution {
    client: Client,
    seat: Arc<Seat>,
    /// Others work, too.
    has_others: bool,
    blob: Digest,
    events: tonic::Streaming<ResolveEvent>,
    digests: Option<(u32, Vec<u8>)>,
}

impl Resolution {
    /// The seeder's name.
    pub fn seeder(&self) -> &str {
        &self.seat.name
    }

    /// The next event; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Event>, SeederError> {
        let (seat, events) = (&self.seat, &mut self.events);
        let next = async {
            match tokio::time::timeout(seat.stall, events.message()).await.map_err(|_| seat.stalled())? {
                Ok(event) => Ok(event),
                Err(status) => Err(seat.status_error(status).await),
            }
        };
        let next = seat.attend(self.has_others, next).await.inspect_err(|error| seat.judge(error))?;
        let Some(event) = next else { return Ok(None) };
        let event = event.event.ok_or_else(|| self.seat.wrong("an event of an unknown kind"))?;
        Ok(Some(match event {
            resolve_event::Event::Progress(progress) => {
                self.digests = Some((progress.first_digest, progress.digests));
                Event::Progress(Progress {
                    blob_read: progress.blob_read,
                    blob_size: progress.blob_size,
                    device_read: progress.device_read,
                    ahead_read: progress.ahead_read,
                })
            }
            resolve_event::Event::Unsupported(unsupported) => {
                Event::Unsupported(unsupported.reason.chars().take(REASON_BYTES_MAX).collect())
            }
            resolve_event::Event::Ready(ready) => {
                let header = Header::parse(&ready.header).map_err(|error| self.seat.wrong(error))?;
                if header.blob() != self.blob {
                    return Err(self.seat.wrong(format!("the index of {}", header.blob())));
                }
                let signed = Signed { signature: ready.signature, certificates: ready.certificates };
                Event::Ready { header: Box::new(header), signed }
            }
        }))
    }

    /// The error for a conversation that ended before the layer was ready.
    pub fn ended_early(&self) -> SeederError {
        let reason = "the conversation ended before the layer was ready".to_owned();
        let error = SeederError::Unreachable { seeder: self.seat.name.clone(), reason };
        self.seat.judge(&error);
        error
    }

    /// Fetches a section from this seeder or from whom it names. Its digest is not verified.
    pub async fn section(&self, header: &Header, section: Section) -> Result<Vec<u8>, SeederError> {
        let fetched = self.seat.attend(self.has_others, self.client.section_by(&self.seat, header, section)).await;
        fetched.inspect_err(|error| self.seat.judge(error))
    }

    /// Whether another seeder works, so that it may be asked after a failure of this one.
    pub(crate) const fn has_others(&self) -> bool {
        self.has_others
    }

    /// What came with the last event: the digests of chunks that the seeder made, and the first of these chunks.
    pub(crate) fn take_digests(&mut self) -> Option<(u32, Vec<u8>)> {
        self.digests.take()
    }

    /// Where the chunks of the layer come from while the seeder makes them.
    pub(crate) fn feed(&self) -> Feed {
        Feed { client: self.client.clone(), seat: Arc::clone(&self.seat), blob: self.blob }
    }
}

impl Seat {
    fn new(name: String, bulk: Bulk, http2: Connector, options: Options) -> Self {
        // The connector decides where to; tonic only wants a URI.
        let channel = Endpoint::from_static("http://seeder")
            .http2_keep_alive_interval(options.stall_timeout / 2)
            .keep_alive_timeout(options.stall_timeout / 2)
            .connect_with_connector_lazy(http2);
        let moved = Moved { at: tokio::time::Instant::now(), bytes: 0 };
        Self { name, bulk, channel, stall: options.stall_timeout, rest: Mutex::default(), moved: Mutex::new(moved) }
    }

    /// Waits for what this seeder does; where there are others, only while it answers at all. An ingest may be silent for long, but
    /// whoever does it says that it lives.
    async fn attend<T>(
        &self,
        has_others: bool,
        work: impl Future<Output = Result<T, SeederError>>,
    ) -> Result<T, SeederError> {
        let mut work = pin!(work);
        let mut missed = 0;
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                lives = self.lives(), if has_others => {
                    missed = if lives { 0 } else { missed + 1 };
                    if missed == SIGNS {
                        return Err(self.error(Fault::Stalled(QUIET * 2 * SIGNS)));
                    }
                }
            }
        }
    }

    /// Whether it answers, asked after a while.
    async fn lives(&self) -> bool {
        tokio::time::sleep(QUIET).await;
        tokio::time::timeout(QUIET, self.bulk.get("/healthz")).await.is_ok()
    }

    pub(super) async fn chunks(&self, blob: Digest, run: &Range<u32>, priority: Priority) -> Result<Body, SeederError> {
        self.bulk.chunks(blob, run, priority).await.map_err(|fault| self.error(fault))
    }

    /// The meaning of a gRPC status. One that the transport made is asked after over HTTP/1.1, whose answer says what is
    /// wrong where the seeder demands TLS and this machine does not speak it.
    async fn status_error(&self, status: tonic::Status) -> SeederError {
        let seeder = self.name.clone();
        let reason = status.message().chars().take(REASON_BYTES_MAX).collect::<String>();
        match status.code() {
            tonic::Code::Cancelled | tonic::Code::Unknown | tonic::Code::Unavailable | tonic::Code::Internal
                if std::error::Error::source(&status).is_some() =>
            {
                match Fault::of_transport(&status) {
                    Fault::Unreachable(reason) => match self.bulk.get("/healthz").await {
                        Err(fault @ Fault::Untrusted(_)) => self.error(fault),
                        _ => SeederError::Unreachable { seeder, reason },
                    },
                    fault => self.error(fault),
                }
            }
            tonic::Code::ResourceExhausted => SeederError::Overloaded { seeder, reason, retry_after: None },
            tonic::Code::Unimplemented | tonic::Code::InvalidArgument => SeederError::Wrong { seeder, reason },
            _ => SeederError::Ingest { seeder, reason },
        }
    }

    async fn enrolment_error(&self, status: tonic::Status) -> SeederError {
        if std::error::Error::source(&status).is_some() {
            return self.status_error(status).await;
        }
        let reason = match status.code() {
            tonic::Code::Unimplemented => NO_ENROLMENT.to_owned(),
            _ => status.message().chars().take(REASON_BYTES_MAX).collect(),
        };
        SeederError::Refused { seeder: self.name.clone(), reason }
    }

    pub(super) fn error(&self, fault: Fault) -> SeederError {
        SeederError::of(&self.name, fault)
    }

    fn stalled(&self) -> SeederError {
        self.error(Fault::Stalled(self.stall))
    }

    fn wrong(&self, reason: impl ToString) -> SeederError {
        self.error(Fault::wrong(reason))
    }

    /// It answered, whatever it said.
    pub(super) fn note_answer(&self) {
        *self.moved.lock() = Moved { at: tokio::time::Instant::now(), bytes: 0 };
    }

    /// It gave so many bytes of chunks.
    pub(super) fn note_moved(&self, bytes: usize) {
        let mut moved = self.moved.lock();
        moved.bytes += bytes;
        if moved.bytes >= MOVED_MIN {
            *moved = Moved { at: tokio::time::Instant::now(), bytes: 0 };
        }
    }

    /// When it last gave something worth mentioning, to whatever fetch.
    pub(super) fn moved_at(&self) -> tokio::time::Instant {
        self.moved.lock().at
    }

    /// It gave nothing to any fetch for `silence` while another seeder works: it rests. Fetches that see the same count once.
    pub(super) fn judge_silent(&self, silence: Duration) {
        if self.resting().is_none() {
            tracing::debug!(seeder = self.name, ?silence, "it gives nothing: another seeder is asked");
            self.judge(&self.error(Fault::Stalled(silence)));
        }
    }

    /// When the rest ends; `None` without one.
    pub(super) fn resting(&self) -> Option<Instant> {
        self.rest.lock().until.filter(|until| *until > Instant::now())
    }

    pub(super) fn praise(&self) {
        *self.rest.lock() = Rest::default();
    }

    pub(super) fn judge(&self, error: &SeederError) {
        let wanted = match error {
            SeederError::Busy { .. }
            | SeederError::Ungranted { .. }
            | SeederError::Missing { .. }
            | SeederError::Ingest { .. }
            | SeederError::None(_) => return,
            SeederError::Overloaded { retry_after, .. } => *retry_after,
            _ => None,
        };
        let mut rest = self.rest.lock();
        rest.failures = rest.failures.saturating_add(1);
        let own = REST.saturating_mul(1 << rest.failures.min(8)).min(REST_MAX);
        rest.until = Some(Instant::now() + wanted.map_or(own, |wanted| wanted.min(REST_MAX)));
    }
}

#[cfg(test)]
mod tests;
