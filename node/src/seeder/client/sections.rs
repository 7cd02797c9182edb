//! Index sections, from a seeder or from the nodes that it names.

use std::time::{Duration, Instant};

use layer::index::{Header, Section};

use super::{Client, Seat, SeederError};
use crate::bulk::{Fault, Options};
use crate::mesh::peer::PeerClient;
use crate::mesh::{Member, Turned};

/// How long the first nodes that get a section are waited for.
const PATIENCE: Duration = Duration::from_secs(5);
/// A node that is named may have gone since; a pull waits meanwhile.
const MEMBER: Options = Options { connect_timeout: Duration::from_secs(1), stall_timeout: Duration::from_secs(2) };
/// Of the nodes that are named so many are tried.
const MEMBERS_TRIED: usize = 2;

impl Client {
    /// Fetches a section from a seeder, which may send this node to others that have it. Where they do not give it, the seeder
    /// does: it sends away only who says who it is.
    pub(super) async fn section_by(
        &self,
        seat: &Seat,
        header: &Header,
        section: Section,
    ) -> Result<Vec<u8>, SeederError> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            match seat.bulk.section(header, section, true).await {
                Err(Fault::Busy(Turned { peers, retry_after })) if peers.is_empty() => {
                    tokio::time::sleep(retry_after.min(PATIENCE)).await;
                }
                Err(Fault::Busy(Turned { peers, .. })) => match self.section_of(&peers, header, section).await {
                    Some(bytes) => return Ok(bytes),
                    None => break,
                },
                answer => return answer.map_err(|fault| seat.error(fault)),
            }
        }
        seat.bulk.section(header, section, false).await.map_err(|fault| seat.error(fault))
    }

    async fn section_of(&self, members: &[Member], header: &Header, section: Section) -> Option<Vec<u8>> {
        for member in members.iter().take(MEMBERS_TRIED) {
            let (own_address, grants) = (self.shared.own_address.clone(), self.shared.grants.clone());
            let security = &self.shared.security;
            let client = PeerClient::new(member.address, security, own_address, Some(grants), MEMBER).ok()?;
            match client.section(header, section).await {
                Some(bytes) => return Some(bytes),
                None => tracing::debug!(blob = %header.blob(), %section, %member, "a node does not give a section"),
            }
        }
        None
    }
}
