//! Seeders as those who give grants.

use std::sync::Weak;

use layer::Digest;
use proto::drover::grant::v1 as api;
use proto::drover::grant::v1::grants_client::GrantsClient;

use super::{Client, REASON_BYTES_MAX, Seat, SeederError, Shared};
use crate::grant::TOKEN_BYTES_MAX;
use crate::grant::held::{Answer, Giver};
use crate::source::BoxFuture;

/// Of the client whose part it is.
pub(super) struct Seeders(pub(super) Weak<Shared>);

impl Giver for Seeders {
    fn ask(&self, blob: Digest, request: api::AskRequest) -> BoxFuture<'_, Answer> {
        Box::pin(async move {
            let Some(shared) = self.0.upgrade() else { return Answer::Later("this machine stops".to_owned()) };
            let client = Client { shared };
            let asked = client.first_of(blob, |seat, _| {
                let request = request.clone();
                async move { ask(&seat, request).await }
            });
            asked.await.unwrap_or_else(|error| Answer::Later(error.to_string()))
        })
    }
}

async fn ask(seat: &Seat, request: api::AskRequest) -> Result<Answer, SeederError> {
    let mut grants = GrantsClient::new(seat.channel.clone()).max_decoding_message_size(2 * TOKEN_BYTES_MAX);
    let answer = tokio::time::timeout(seat.stall, grants.ask(request)).await;
    let status = match answer.map_err(|_| seat.stalled())? {
        Ok(grant) => return Ok(Answer::Granted(grant.into_inner())),
        Err(status) => status,
    };
    if std::error::Error::source(&status).is_some() {
        return Err(seat.status_error(status).await);
    }
    let reason: String = status.message().chars().take(REASON_BYTES_MAX).collect();
    let said = format!("seeder {}: {reason}", seat.name);
    Ok(match status.code() {
        tonic::Code::Unauthenticated => Answer::NeedsCredentials(said),
        tonic::Code::PermissionDenied | tonic::Code::InvalidArgument => Answer::Denied(said),
        tonic::Code::NotFound => return Err(SeederError::Missing { seeder: seat.name.clone(), reason }),
        tonic::Code::Unimplemented => Answer::Later(format!("seeder {} gives no grants (grants.mode)", seat.name)),
        _ => Answer::Later(said),
    })
}
