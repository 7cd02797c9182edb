//! Client of containerd's content store: which blobs are on this machine already, and their bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use layer::Digest;
use proto::containerd::services::content::v1 as wire;
use proto::containerd::services::content::v1::content_client::ContentClient;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::connection::{Connection, DEADLINE, MESSAGE_BYTES_MAX, NamespaceError, request, within};

/// Marks the manifests among all content: they refer to a configuration.
const MANIFESTS: &str = "labels.\"containerd.io/gc.ref.content.config\"";

/// Most manifests of one namespace that are looked at. Chosen: a node has some hundred images.
const MANIFESTS_MAX: usize = 10_000;

/// Longest read of a part of a blob. Chosen: a span takes milliseconds from a disk that works.
const READ_DEADLINE: std::time::Duration = std::time::Duration::from_secs(60);

/// Containerd's content store.
#[derive(Debug, Clone)]
pub struct ContentStore {
    pub(super) client: ContentClient<Channel>,
    socket: PathBuf,
}

/// What the content store knows of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its labels, among them `containerd.io/distribution.source.REGISTRY`.
    pub labels: HashMap<String, String>,
    /// When its labels changed last: every pull of an image that is here already sets them again.
    pub updated: SystemTime,
}

/// Why the content store gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Not a namespace that a header can hold.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// A call about one blob failed.
    #[error("content store at {socket}: cannot get {digest}")]
    Call {
        /// Containerd's socket.
        socket: PathBuf,
        /// The blob that was asked for.
        digest: Digest,
        /// Containerd's answer, or why there is none.
        #[source]
        source: Box<Status>,
    },
    /// The list failed.
    #[error("content store at {socket}: cannot list the manifests")]
    List {
        /// Containerd's socket.
        socket: PathBuf,
        /// Containerd's answer, or why there is none.
        #[source]
        source: Box<Status>,
    },
    /// The blob is larger than the caller wants to hold.
    #[error("{digest} in the content store has {size} bytes, more than {limit}")]
    TooLarge {
        /// The blob.
        digest: Digest,
        /// Its size.
        size: u64,
        /// The caller's limit.
        limit: u64,
    },
    /// The bytes are not those of the digest.
    #[error("the content store gave other bytes than those of {digest}")]
    Digest {
        /// The blob that was asked for.
        digest: Digest,
    },
}

/// The bytes of a part of a blob, as they come. They are not verified.
#[derive(Debug)]
pub struct ContentBody {
    answer: Streaming<wire::ReadContentResponse>,
    first: Option<Bytes>,
    store: ContentStore,
    digest: Digest,
}

impl ContentStore {
    /// The content store of the containerd behind `connection`.
    pub fn new(connection: &Connection) -> Self {
        let client = ContentClient::new(connection.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX);
        Self { client, socket: connection.socket().to_owned() }
    }

    /// What is known of `digest` in `namespace`; `None` if it is not there.
    pub async fn info(&self, namespace: &str, digest: Digest) -> Result<Option<Info>, ContentError> {
        let request = request(namespace, wire::InfoRequest { digest: digest.to_string() }, DEADLINE)?;
        match within(DEADLINE, self.client.clone().info(request)).await {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| Info::of(digest, info))),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(digest, status)),
        }
    }

    /// The manifests of images in `namespace`, the one that was pulled last first.
    pub async fn manifests(&self, namespace: &str) -> Result<Vec<Info>, ContentError> {
        let request = request(namespace, wire::ListContentRequest { filters: vec![MANIFESTS.to_owned()] }, DEADLINE)?;
        let transfer = async {
            let mut answer = self.client.clone().list(request).await?.into_inner();
            let mut manifests = Vec::new();
            while let Some(part) = answer.message().await? {
                let known = part.info.into_iter().filter_map(|info| Some(Info::of(info.digest.parse().ok()?, info)));
                manifests.extend(known);
                if manifests.len() > MANIFESTS_MAX {
                    break;
                }
            }
            Ok(manifests)
        };
        let list = within(DEADLINE, transfer).await;
        let mut manifests =
            list.map_err(|status| ContentError::List { socket: self.socket.clone(), source: Box::new(status) })?;
        manifests.sort_by_key(|info| std::cmp::Reverse(info.updated));
        Ok(manifests)
    }

    /// The bytes of `digest` in `namespace`, checked; `None` if it is not there. For manifests and configs: more than `limit`
    /// bytes are an error.
    pub async fn read(&self, namespace: &str, digest: Digest, limit: u64) -> Result<Option<Bytes>, ContentError> {
        let Some(info) = self.info(namespace, digest).await? else { return Ok(None) };
        let too_large = |size| ContentError::TooLarge { digest, size, limit };
        if info.size > limit {
            return Err(too_large(info.size));
        }
        let whole = wire::ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 };
        let request = request(namespace, whole, DEADLINE)?;
        let transfer = async {
            let mut answer = self.client.clone().read(request).await?.into_inner();
            let mut bytes = BytesMut::new();
            while let Some(part) = answer.message().await? {
                bytes.extend_from_slice(&part.data);
                if bytes.len() as u64 > limit {
                    break;
                }
            }
            Ok(bytes.freeze())
        };
        let bytes = match within(DEADLINE, transfer).await {
            Ok(bytes) => bytes,
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(self.failed(digest, status)),
        };
        if bytes.len() as u64 > limit {
            return Err(too_large(bytes.len() as u64));
        }
        if Digest::of(&bytes) != digest {
            return Err(ContentError::Digest { digest });
        }
        Ok(Some(bytes))
    }

    /// Opens the bytes `range` of `digest` in `namespace`; `None` if it is not there.
    pub async fn open(
        &self,
        namespace: &str,
        digest: Digest,
        range: Range<u64>,
    ) -> Result<Option<ContentBody>, ContentError> {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let part = wire::ReadContentRequest {
            digest: digest.to_string(),
            offset: number(range.start),
            size: number(range.end.saturating_sub(range.start)),
        };
        let request = request(namespace, part, READ_DEADLINE)?;
        let opened = async {
            let mut answer = self.client.clone().read(request).await?.into_inner();
            // Containerd says only here that it does not have the blob.
            let first = answer.message().await?.map(|part| Bytes::from(part.data));
            Ok((answer, first))
        };
        match within(DEADLINE, opened).await {
            Ok((answer, first)) => Ok(Some(ContentBody { answer, first, store: self.clone(), digest })),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(digest, status)),
        }
    }

    fn failed(&self, digest: Digest, status: Status) -> ContentError {
        ContentError::Call { socket: self.socket.clone(), digest, source: Box::new(status) }
    }
}

impl ContentBody {
    /// The next bytes; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ContentError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        let next = within(DEADLINE, self.answer.message()).await;
        let part = next.map_err(|status| self.store.failed(self.digest, status))?;
        Ok(part.map(|part| part.data.into()))
    }
}

impl Info {
    fn of(digest: Digest, info: wire::Info) -> Self {
        let updated = info.updated_at.and_then(|time| SystemTime::try_from(time).ok());
        Self {
            digest,
            size: u64::try_from(info.size).unwrap_or(0),
            labels: info.labels,
            updated: updated.unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeContainerd;
    use super::*;

    const BLOB: &[u8] = b"{\"a\":1}";

    #[tokio::test]
    async fn reads_only_what_is_there_small_and_true() {
        let containerd = FakeContainerd::start();
        let nobody = ContentStore::new(&Connection::new(&containerd.folder().join("nobody.sock")));
        let store = containerd.content();
        let digest = containerd.put("here", BLOB, &[("containerd.io/distribution.source.r", "a")]);
        containerd.put_as("here", Digest::of(b"lie"), b"truth", &[]);
        assert!(matches!(nobody.info("here", digest).await, Err(ContentError::Call { .. })));

        let info = store.info("here", digest).await.expect("asks").expect("is there");
        assert_eq!((info.size, info.labels["containerd.io/distribution.source.r"].as_str()), (7, "a"));
        assert_eq!(store.info("elsewhere", digest).await.expect("asks"), None);
        assert_eq!(store.read("here", digest, 7).await.expect("reads").as_deref(), Some(BLOB));
        assert_eq!(store.read("elsewhere", digest, 7).await.expect("asks"), None);
        assert!(matches!(store.read("here", digest, 6).await, Err(ContentError::TooLarge { size: 7, .. })));
        assert!(matches!(store.read("here", Digest::of(b"lie"), 99).await, Err(ContentError::Digest { .. })));
        assert!(matches!(store.info("line\nbreak", digest).await, Err(ContentError::Namespace { .. })));
    }

    #[tokio::test]
    async fn opens_parts() {
        let containerd = FakeContainerd::start();
        let bytes: Vec<u8> = (0..10_000_u32).map(|n| n as u8).collect();
        let digest = containerd.put("here", &bytes, &[]);
        let store = containerd.content();
        let mut body = store.open("here", digest, 100..9000).await.expect("opens").expect("is there");
        let mut read = Vec::new();
        while let Some(part) = body.next().await.expect("reads") {
            read.extend_from_slice(&part);
        }
        assert_eq!(read, bytes[100..9000]);
        containerd.remove("here", digest);
        assert!(store.open("here", digest, 0..1).await.expect("asks").is_none());
    }
}
