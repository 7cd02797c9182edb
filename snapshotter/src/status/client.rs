//! The daemon as its own command line asks it.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use hyper_util::rt::TokioIo;
use layer::Digest;
use proto::drover::node::v1::node_client::NodeClient;
use proto::drover::node::v1::{
    CompleteProgress, CompleteRequest, ScrubRequest, ScrubResponse, StatusRequest, StatusResponse,
};
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};

/// How long an answer is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a daemon that is gone is waited for: its keeper starts it again.
const RESTART: Duration = Duration::from_secs(30);

/// How long to wait before it is asked again.
const PAUSE: Duration = Duration::from_millis(250);

/// What the daemon at `socket` says of itself.
pub async fn status(socket: &Path) -> anyhow::Result<StatusResponse> {
    let ask = async { anyhow::Ok(self::ask(socket).await?.status(StatusRequest {}).await?.into_inner()) };
    tokio::time::timeout(PATIENCE, ask)
        .await
        .with_context(|| format!("no answer within {PATIENCE:?}"))
        .flatten()
        .with_context(|| cannot_ask(socket))
}

/// Lets the daemon at `socket` compare all that is on its disk with the digests, and waits for it.
pub async fn scrub(socket: &Path) -> anyhow::Result<ScrubResponse> {
    let ask = async { anyhow::Ok(self::ask(socket).await?.scrub(ScrubRequest {}).await?.into_inner()) };
    ask.await.with_context(|| cannot_ask(socket))
}

/// Lets the daemon at `socket` fetch the layers with these blobs whole and waits for it; a daemon that is restarted meanwhile is
/// asked again. `show` is told how far it is.
pub async fn complete(socket: &Path, blobs: &[Digest], mut show: impl FnMut(&CompleteProgress)) -> anyhow::Result<()> {
    let request = CompleteRequest { blobs: blobs.iter().map(Digest::to_string).collect() };
    let mut lost: Option<Instant> = None;
    loop {
        let asked = async {
            let mut progress = ask(socket).await?.complete(request.clone()).await?.into_inner();
            while let Some(next) = progress.message().await? {
                lost = None;
                show(&next);
            }
            anyhow::Ok(())
        };
        match asked.await {
            Ok(()) => return Ok(()),
            Err(error) => {
                // What the daemon itself decided stays so; a connection that is lost or cannot be made may come back.
                let decided = error.downcast_ref::<tonic::Status>().filter(|status| {
                    !matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
                });
                if let Some(status) = decided {
                    anyhow::bail!("{}", status.message());
                }
                if lost.get_or_insert_with(Instant::now).elapsed() >= RESTART {
                    return Err(error.context(cannot_ask(socket)));
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn cannot_ask(socket: &Path) -> String {
    format!("cannot ask the daemon at {}: does it run?", socket.display())
}

async fn ask(socket: &Path) -> Result<NodeClient<Channel>, tonic::transport::Error> {
    Ok(NodeClient::new(connect(socket).await?))
}

/// A channel to the daemon at `socket`.
pub(crate) async fn connect(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://drover").connect_with_connector(connect).await
}
