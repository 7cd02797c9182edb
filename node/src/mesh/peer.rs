//! Another node, seen from this one: connections to it, and its chunks.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use layer::index::{Header, Section, check_section};
use layer::{Digest, Geometry};
use rustls_pki_types::ServerName;
use tonic::transport::{Channel, Endpoint};

use super::member::OwnAddress;
use crate::bulk::follow::Follow;
use crate::bulk::{Bulk, Fault};
use crate::connect::Connector;
use crate::grant::Held;
use crate::security::{Security, tls};
use crate::source::{BoxFuture, ChunkSink, Priority, Source, SourceError, SourceKind};

pub use crate::bulk::Options;

/// Connections to one member of the mesh for chunks. Made when they are needed, kept a while. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PeerClient {
    address: SocketAddr,
    bulk: Arc<Bulk>,
}

/// The chunks of one layer that a member has. It is asked only for what it told that it has.
#[derive(Debug)]
pub struct PeerSource {
    client: PeerClient,
    blob: Digest,
    geometry: Geometry,
}

impl PeerClient {
    /// Of the member at `address`; with TLS it has to be some machine of the cluster. `own_address` goes with what is asked, and a
    /// grant of `grants` where the member demands one.
    pub fn new(
        address: SocketAddr,
        security: &Security,
        own_address: OwnAddress,
        grants: Option<Held>,
        options: Options,
    ) -> Result<Self, rustls::Error> {
        let connector = connector(address, security, tls::HTTP1, options)?;
        let bulk = Bulk::new(connector, options.stall_timeout, own_address, grants);
        Ok(Self { address, bulk: Arc::new(bulk) })
    }

    /// What the member has of a layer that is being ingested, from chunk `first` on, as it comes.
    pub(crate) async fn follow(&self, blob: Digest, first: u32) -> Result<Follow, Fault> {
        Ok(self.bulk.follow(blob, first).await?.over(Arc::clone(&self.bulk)))
    }

    /// A section of the index that `header` names, as the member has it: `None` where it does not, or sends something else.
    pub(crate) async fn section(&self, header: &Header, section: Section) -> Option<Vec<u8>> {
        let bytes = self.bulk.section(header, section, false).await.ok()?;
        check_section(header, section, &bytes).ok().map(|()| bytes)
    }
}

/// A connection for gRPC to the member at `address`, made when it is first used. The line on it is found dead after 10 s.
pub fn channel(address: SocketAddr, security: &Security) -> Result<Channel, rustls::Error> {
    let options = Options::default();
    let connector = connector(address, security, tls::HTTP2, options)?;
    // The connector decides where to; tonic only wants a URI.
    Ok(Endpoint::from_static("http://peer")
        .http2_keep_alive_interval(options.stall_timeout / 2)
        .keep_alive_timeout(options.stall_timeout / 2)
        .connect_with_connector_lazy(connector))
}

fn connector(
    address: SocketAddr,
    security: &Security,
    alpn: &[u8],
    options: Options,
) -> Result<Connector, rustls::Error> {
    let tls = match security {
        Security::Off => None,
        Security::Mutual(identity) => {
            Some((tls::peer_client(identity, alpn)?, ServerName::IpAddress(address.ip().into())))
        }
    };
    Ok(Connector::new(address, tls, options.connect_timeout))
}

impl PeerSource {
    /// The layer of `blob`, whose device is cut by `geometry`.
    pub const fn new(client: PeerClient, blob: Digest, geometry: Geometry) -> Self {
        Self { client, blob, geometry }
    }

    async fn fetch_run(
        &self,
        run: Range<u32>,
        priority: Priority,
        sink: &mut dyn ChunkSink,
    ) -> Result<(), SourceError> {
        let moved = async {
            let body = self.client.bulk.chunks(self.blob, &run, priority).await?;
            body.move_chunks(self.geometry, run, sink).await
        };
        moved.await.map_err(|fault| fault.into_source_error(self.label()))
    }
}

impl Source for PeerSource {
    fn kind(&self) -> SourceKind {
        SourceKind::Peer
    }

    fn label(&self) -> String {
        format!("peer {}", self.client.address)
    }

    fn fetch<'a>(
        &'a self,
        run: Range<u32>,
        priority: Priority,
        sink: &'a mut dyn ChunkSink,
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.fetch_run(run, priority, sink))
    }
}
