//! The chunks of a layer while a seeder makes them: from it, or from the node that it names.

use std::sync::Arc;
use std::time::Duration;

use layer::Digest;

use super::{Client, Seat};
use crate::bulk::follow::Follow;
use crate::bulk::{Fault, Options};
use crate::mesh::Turned;
use crate::mesh::peer::PeerClient;
use crate::source::SourceKind;

/// A node that is named may have gone since.
const CONNECT: Duration = Duration::from_secs(1);

/// Where a layer comes from while its index is being made.
#[derive(Clone)]
pub(crate) struct Feed {
    pub(super) client: Client,
    pub(super) seat: Arc<Seat>,
    pub(super) blob: Digest,
}

impl Feed {
    /// This machine takes part in a mesh whose seeders do not know it yet.
    pub(crate) fn is_line_awaited(&self) -> bool {
        let address = self.client.own_address();
        address.is_awaited() && address.get().is_none()
    }

    /// The chunks from `first` on, from the seeder or from whom it names, and which of these it is.
    pub(crate) async fn follow(&self, first: u32) -> Result<(Follow, SourceKind), Fault> {
        let turned = match self.seat.bulk.follow(self.blob, first).await {
            Ok(follow) => return Ok((follow, SourceKind::Seeder)),
            Err(Fault::Busy(turned)) => turned,
            Err(fault) => return Err(fault),
        };
        let Some(member) = turned.peers.first() else {
            return Err(Fault::Busy(Turned { peers: Vec::new(), ..turned }));
        };
        let shared = &self.client.shared;
        let options = Options { connect_timeout: CONNECT, ..shared.options };
        let (own_address, grants) = (shared.own_address.clone(), shared.grants.clone());
        let peer = PeerClient::new(member.address, &shared.security, own_address, Some(grants), options);
        let follow = peer.map_err(Fault::wrong)?.follow(self.blob, first).await?;
        Ok((follow, SourceKind::Peer))
    }
}
