//! A machine of the cluster that behaves badly: it has a certificate and says that it has all of a layer.

use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use lab::network::{Host, Network, Place};
use layer::index::Section;
use layer::wire::Frame;
use layer::{Digest, Geometry};
use node::config::{MtlsConfig, SecurityConfig};
use node::mesh::{Asker, peer};
use node::security::{Role, Security};
use node::serve::{self, ByteStream, Frames, LayerServer, Limits, Listener, SectionBody, ServeError};
use node::source::BoxFuture;
use proto::drover::mesh::v1 as api;
use proto::drover::mesh::v1::neighbour_client::NeighbourClient;
use proto::drover::mesh::v1::neighbour_server::{Neighbour, NeighbourServer};
use proto::drover::mesh::v1::tracker_client::TrackerClient;
use proto::drover::mesh::v1::{from_seeder, to_neighbour, to_seeder};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status, Streaming};

use crate::PORT;

/// What it does when it is asked for chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Conduct {
    /// It sends chunks of the right length that are not those of the layer.
    Lies,
    /// It sends a byte each second.
    Trickles,
    /// It says that it will answer, and never does.
    IsSilent,
}

/// The machine, which is in the mesh from [`Rogue::join`] until it is dropped.
#[derive(Debug)]
pub(crate) struct Rogue {
    asked: Arc<AtomicU64>,
    stop: Option<DropGuard>,
    thread: Option<JoinHandle<Result<()>>>,
    host: Host,
}

impl Rogue {
    /// Adds the machine with this number, which no node has, and lets it join the layer of `blob`. `certificate` is a node's, whose
    /// key is beside it; `ca` is that of the cluster's authority.
    pub(crate) fn join(
        network: &Network,
        number: u16,
        (ca, certificate): (&Path, &Path),
        (blob, geometry): (Digest, Geometry),
        conduct: Conduct,
    ) -> Result<Self> {
        let files = MtlsConfig {
            ca: ca.to_owned(),
            certificate: certificate.to_owned(),
            key: certificate.with_extension("key"),
        };
        let security = Security::load(&SecurityConfig::Mtls(files), Role::Node, Path::new("/nonexistent"))?;
        let host = network.add_node(number)?;
        let me = SocketAddr::new(network.address(host.place()).into(), PORT);
        let seeder = SocketAddr::new(network.address(Place::Seeder).into(), 7070);
        let (asked, stop) = (Arc::new(AtomicU64::new(0)), CancellationToken::new());
        let chunks = Chunks { geometry, conduct, asked: Arc::clone(&asked) };
        let member = Member { me, seeder, blob, count: geometry.chunk_count(), security };
        let (joined, has_joined) = std::sync::mpsc::channel();
        let stopped = stop.clone();
        let thread = network.at(host.place(), move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let listener = Listener::bind(&me.to_string(), &member.security, Limits::default()).await?;
                let router = serve::router(Arc::new(chunks), 1024);
                let router = router.route_service("/drover.mesh.v1.Neighbour/{method}", NeighbourServer::new(Ears));
                tokio::spawn(listener.serve(router, stopped.clone()));
                stopped.run_until_cancelled(member.hold_line(joined)).await.unwrap_or(Ok(()))
            })
        });
        let mut rogue = Self { asked, stop: Some(stop.drop_guard()), thread: Some(thread), host };
        if has_joined.recv_timeout(Duration::from_secs(60)).is_err() {
            rogue.end().context("the rogue is not in the mesh")?;
            return Err(anyhow!("the rogue is not in the mesh"));
        }
        Ok(rogue)
    }

    /// Its address in the mesh.
    pub(crate) fn address(&self) -> String {
        format!("{}:{PORT}", self.host.place().address())
    }

    /// How often it was asked for chunks.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    fn end(&mut self) -> Result<()> {
        self.stop = None;
        let thread = self.thread.take().context("it ended before")?;
        thread.join().map_err(|_| anyhow!("the rogue's thread panicked"))?
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("the rogue: {error:#}");
        }
    }
}

/// Its lines.
struct Member {
    me: SocketAddr,
    seeder: SocketAddr,
    blob: Digest,
    count: u32,
    security: Security,
}

impl Member {
    async fn hold_line(self, joined: std::sync::mpsc::Sender<()>) -> Result<()> {
        let hello = api::Hello { address: self.me.to_string(), ..api::Hello::default() };
        let haves = api::Haves { blob: self.blob.as_bytes().to_vec(), runs: vec![0, self.count], fills: None };
        let mut client = TrackerClient::new(peer::channel(self.seeder, &self.security)?);
        let says = [to_seeder::Message::Hello(hello.clone()), to_seeder::Message::Join(haves.clone())];
        let says = says.map(|message| api::ToSeeder { message: Some(message) });
        let mut told = client.join(tokio_stream::iter(says).chain(tokio_stream::pending())).await?.into_inner();
        let mut lines = Vec::new();
        while let Some(api::FromSeeder { message }) = told.message().await? {
            match message {
                Some(from_seeder::Message::Welcome(welcome)) => {
                    ensure!(welcome.address == self.me.to_string(), "welcome to {}", welcome.address);
                    let _ = joined.send(());
                }
                Some(from_seeder::Message::Introduce(api::Introduce { peer: Some(peer), .. })) => {
                    let channel = peer::channel(peer.address.parse()?, &self.security)?;
                    let haves = api::LayerHaves { haves: Some(haves.clone()), ..Default::default() };
                    let says = [to_neighbour::Message::Hello(hello.clone()), to_neighbour::Message::Haves(haves)];
                    let says = says.map(|message| api::ToNeighbour { message: Some(message) });
                    lines.push(tokio::spawn(async move {
                        let says = tokio_stream::iter(says).chain(tokio_stream::pending());
                        if let Ok(line) = NeighbourClient::new(channel).tell(says).await {
                            // Held until the neighbour ends it.
                            let _ = line.into_inner().message().await;
                        }
                    }));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Listens to neighbours and remembers nothing.
struct Ears;

#[tonic::async_trait]
impl Neighbour for Ears {
    type TellStream = ReceiverStream<Result<api::Told, Status>>;

    async fn tell(&self, request: Request<Streaming<api::ToNeighbour>>) -> Result<Response<Self::TellStream>, Status> {
        let mut told = request.into_inner();
        let (end, ended) = mpsc::channel(1);
        tokio::spawn(async move {
            while let Ok(Some(_)) = told.message().await {}
            drop(end);
        });
        Ok(Response::new(ReceiverStream::new(ended)))
    }
}

/// The chunks that it gives.
struct Chunks {
    geometry: Geometry,
    conduct: Conduct,
    asked: Arc<AtomicU64>,
}

impl LayerServer for Chunks {
    fn header(&self, _: Digest) -> BoxFuture<'_, Result<Bytes, ServeError>> {
        Box::pin(async { Err(ServeError::Unknown) })
    }

    fn section(&self, _: Digest, _: Section, _: Asker) -> BoxFuture<'_, Result<SectionBody, ServeError>> {
        Box::pin(async { Err(ServeError::Unknown) })
    }

    fn chunks(&self, _: Digest, run: Range<u32>, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let (conduct, geometry) = (self.conduct, self.geometry);
        Box::pin(async move {
            let stream: ByteStream = match conduct {
                Conduct::Lies => {
                    let frames = run.map(move |chunk| {
                        let plain = vec![0x5a; geometry.chunk_len(layer::ChunkIndex(chunk))];
                        let mut frame = Vec::new();
                        Frame::Plain(&plain).write(&mut frame);
                        Ok(Bytes::from(frame))
                    });
                    Box::pin(tokio_stream::iter(frames))
                }
                Conduct::Trickles => trickle(),
                Conduct::IsSilent => Box::pin(tokio_stream::pending()),
            };
            Ok(Frames { len: None, chunk_log2: None, stream })
        })
    }

    fn follow(&self, _: Digest, _: u32, _: Asker) -> BoxFuture<'_, Result<Frames, ServeError>> {
        Box::pin(async { Err(ServeError::Unknown) })
    }
}

/// The beginning of a frame, a byte each second.
fn trickle() -> ByteStream {
    let plain = vec![0; 128 << 10];
    let mut frame = Vec::new();
    Frame::Plain(&plain).write(&mut frame);
    let (bytes, slow) = mpsc::channel(1);
    tokio::spawn(async move {
        for byte in frame {
            if bytes.send(Ok(Bytes::from(vec![byte]))).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let slow: Pin<Box<dyn Stream<Item = _> + Send>> = Box::pin(ReceiverStream::new(slow));
    slow
}
