//! What a pull writes into containerd's stores, with the labels that containerd's own pull sets: they keep what belongs together from
//! its garbage collection, and say where it came from.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use layer::{ChainId, Digest};
use node::registry::BlobBody;
use node::registry::client::Manifest;
use node::registry::image::{Image, ImageRef};
use node::source::BlobRef;
use prost_types::FieldMask;
use proto::containerd::services::content::v1 as content;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::images::v1::images_client::ImagesClient;
use proto::containerd::services::images::v1::{CreateImageRequest, Image as ImageRecord, UpdateImageRequest};
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use proto::containerd::types::Descriptor;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request};

use super::progress::LayerProgress;
use crate::containerd::connection::{Connection, DEADLINE, MESSAGE_BYTES_MAX, namespace_value, within};
use crate::containerd::content::ContentStore;

/// How long containerd keeps what a pull made that died without ending its lease, as its own clients ask for.
const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);

/// Deadline of a call that writes: containerd syncs to disk.
const WRITE_DEADLINE: Duration = Duration::from_secs(60);

/// Longest value of a label: containerd takes 4096 bytes with the key.
const LABEL_BYTES_MAX: usize = 4096;

/// Keeps what is made under it from containerd's garbage collection.
#[derive(Debug)]
pub struct Lease {
    client: LeasesClient<Channel>,
    id: String,
    namespace: MetadataValue<Ascii>,
    namespace_text: String,
}

impl Lease {
    /// A new one in `namespace`.
    pub async fn create(connection: &Connection, namespace: &str) -> anyhow::Result<Self> {
        let mut client = LeasesClient::new(connection.channel());
        let expire = humantime::format_rfc3339_seconds(SystemTime::now() + LEASE_TIME).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expire)]);
        let value = namespace_value(namespace)?;
        let mut request = Request::new(CreateRequest { id: String::new(), labels });
        request.metadata_mut().insert("containerd-namespace", value.clone());
        let answer = within(DEADLINE, client.create(request)).await.context("cannot create a lease")?;
        let id = answer.into_inner().lease.map(|lease| lease.id).filter(|id| !id.is_empty());
        let id = id.context("containerd gave a lease without id")?;
        Ok(Self { client, id, namespace: value, namespace_text: namespace.to_owned() })
    }

    /// Ends it. What nothing else refers to is collected.
    pub async fn end(self) -> anyhow::Result<()> {
        let request = self.request(DeleteRequest { id: self.id.clone(), sync: false })?;
        let mut client = self.client.clone();
        within(DEADLINE, client.delete(request)).await.context("cannot delete the lease")?;
        Ok(())
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace_text
    }

    /// A call whose results it keeps.
    pub fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request.metadata_mut().insert("containerd-lease", self.id.parse().context("the lease's id is no header")?);
        Ok(request)
    }
}

/// Writes into containerd's stores under a lease.
#[derive(Debug)]
pub struct Importer<'a> {
    lease: &'a Lease,
    content: ContentStore,
    client: ContentClient<Channel>,
    images: ImagesClient<Channel>,
    /// `containerd.io/distribution.source.HOST`, without port as containerd has it, and the repository.
    source: (String, String),
}

impl<'a> Importer<'a> {
    /// For an image of the repository of `image`.
    pub fn new(connection: &Connection, lease: &'a Lease, image: &ImageRef) -> Self {
        let host = image.registry();
        let host = host.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).map_or(host, |(host, _)| host);
        let key = format!("containerd.io/distribution.source.{}", host.trim_start_matches('[').trim_end_matches(']'));
        Self {
            lease,
            content: ContentStore::new(connection),
            client: ContentClient::new(connection.channel()).max_decoding_message_size(MESSAGE_BYTES_MAX),
            images: ImagesClient::new(connection.channel()),
            source: (key, image.repository().to_owned()),
        }
    }

    /// An index or a manifest.
    pub async fn document(&self, document: &Manifest) -> anyhow::Result<()> {
        let labels = children(&document.bytes).with_context(|| format!("cannot read {}", document.digest))?;
        self.small(document.digest, &document.bytes, labels).await
    }

    /// The image's configuration.
    pub async fn config(&self, config: &BlobRef, text: &Bytes) -> anyhow::Result<()> {
        self.small(config.digest, text, HashMap::new()).await
    }

    /// Lets `config` keep the snapshots up to `top`.
    pub async fn refer(&self, config: Digest, snapshotter: &str, top: ChainId) -> anyhow::Result<()> {
        let key = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        self.label(config, HashMap::from([(key, top.to_string())])).await
    }

    /// Adds labels to what is there.
    pub async fn label(&self, digest: Digest, labels: HashMap<String, String>) -> anyhow::Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = content::Info { digest: digest.to_string(), labels, ..Default::default() };
        let request = content::UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let call = async { self.client.clone().update(self.lease.request(request).map_err(internal)?).await };
        within(WRITE_DEADLINE, call).await.with_context(|| format!("cannot label {digest}"))?;
        Ok(())
    }

    /// Gives the image its name.
    pub async fn name(&self, name: &str, image: &Image) -> anyhow::Result<()> {
        let root = image.documents.first().context("an image without manifest")?;
        let target = Descriptor {
            media_type: root.media_type.clone(),
            digest: root.digest.to_string(),
            size: i64::try_from(root.bytes.len())?,
            annotations: HashMap::new(),
        };
        let record = ImageRecord { name: name.to_owned(), target: Some(target), ..Default::default() };
        let mut client = self.images.clone();
        let create = self.lease.request(CreateImageRequest { image: Some(record.clone()) })?;
        match within(WRITE_DEADLINE, client.create(create)).await {
            Err(status) if status.code() == Code::AlreadyExists => {}
            answer => return answer.map(drop).with_context(|| format!("cannot create the image {name}")),
        }
        let mask = FieldMask { paths: vec!["target".to_owned()] };
        let update = self.lease.request(UpdateImageRequest { image: Some(record), update_mask: Some(mask) })?;
        within(WRITE_DEADLINE, client.update(update))
            .await
            .with_context(|| format!("cannot update the image {name}"))?;
        Ok(())
    }

    /// A layer's blob, as it comes from its registry.
    pub async fn blob(&self, blob: &BlobRef, mut body: BlobBody, progress: &LayerProgress) -> anyhow::Result<()> {
        let mut written = 0;
        let mut write = Write::start(self, blob.digest, blob.size);
        while let Some(bytes) = body.next().await? {
            let len = bytes.len() as u64;
            if !write.push(bytes, written).await? {
                return self.add_repository(blob.digest).await;
            }
            written += len;
            progress.fetched(written);
        }
        match write.commit(written, self.labels(HashMap::new())).await? {
            true => Ok(()),
            false => self.add_repository(blob.digest).await,
        }
    }

    /// Writes what fits one message.
    async fn small(&self, digest: Digest, bytes: &Bytes, labels: HashMap<String, String>) -> anyhow::Result<()> {
        let mut write = Write::start(self, digest, bytes.len() as u64);
        let is_new = write.push(bytes.clone(), 0).await?
            && write.commit(bytes.len() as u64, self.labels(labels.clone())).await?;
        if is_new {
            return Ok(());
        }
        if !labels.is_empty() {
            self.label(digest, labels).await?;
        }
        self.add_repository(digest).await
    }

    /// Adds our repository to where `digest`, which was there, came from.
    async fn add_repository(&self, digest: Digest) -> anyhow::Result<()> {
        let (key, repository) = &self.source;
        let info = self.content.info(self.lease.namespace(), digest).await?;
        let known = info.and_then(|info| info.labels.get(key).cloned()).unwrap_or_default();
        let mut repositories: BTreeSet<&str> = known.split(',').filter(|name| !name.is_empty()).collect();
        repositories.insert(repository);
        let value = repositories.into_iter().collect::<Vec<_>>().join(",");
        if key.len() + value.len() > LABEL_BYTES_MAX {
            return Ok(());
        }
        self.label(digest, HashMap::from([(key.clone(), value)])).await
    }

    fn labels(&self, mut labels: HashMap<String, String>) -> HashMap<String, String> {
        let (key, repository) = self.source.clone();
        labels.insert(key, repository);
        labels
    }
}

/// A write that is under way.
struct Write<'a> {
    importer: &'a Importer<'a>,
    digest: Digest,
    total: u64,
    stream: Option<(mpsc::Sender<content::WriteContentRequest>, tonic::Streaming<content::WriteContentResponse>)>,
}

impl<'a> Write<'a> {
    fn start(importer: &'a Importer<'a>, digest: Digest, total: u64) -> Self {
        Self { importer, digest, total, stream: None }
    }

    /// Writes `bytes` at `offset`; `false`: the content is there already.
    async fn push(&mut self, bytes: Bytes, offset: u64) -> anyhow::Result<bool> {
        let message = content::WriteContentRequest {
            action: content::WriteAction::Write.into(),
            offset: i64::try_from(offset)?,
            data: bytes.to_vec(),
            ..self.message()?
        };
        self.send(message).await
    }

    /// Ends the write after `written` bytes; `false`: the content is there already.
    async fn commit(&mut self, written: u64, labels: HashMap<String, String>) -> anyhow::Result<bool> {
        let message = content::WriteContentRequest {
            action: content::WriteAction::Commit.into(),
            offset: i64::try_from(written)?,
            labels,
            ..self.message()?
        };
        self.send(message).await
    }

    fn message(&self) -> anyhow::Result<content::WriteContentRequest> {
        Ok(content::WriteContentRequest {
            // Not the name that containerd's own pulls use: two writers of one name lock each other out.
            reference: format!("drover-pull-{}-{}", std::process::id(), self.digest),
            total: i64::try_from(self.total)?,
            expected: self.digest.to_string(),
            ..Default::default()
        })
    }

    /// Sends one message and waits for its answer.
    async fn send(&mut self, message: content::WriteContentRequest) -> anyhow::Result<bool> {
        let importer = self.importer;
        let call = async {
            match &mut self.stream {
                Some((sender, answers)) => {
                    let sent = sender.send(message).await;
                    let answer = answers.message().await?;
                    // Where the call has ended, its error is the answer.
                    if sent.is_err() || answer.is_none() {
                        return Err(tonic::Status::aborted("containerd ended the write"));
                    }
                }
                None => {
                    let (sender, messages) = mpsc::channel(1);
                    let request = importer.lease.request(ReceiverStream::new(messages)).map_err(internal)?;
                    let mut client = importer.client.clone();
                    let (opened, sent) = tokio::join!(client.write(request), sender.send(message));
                    let mut answers = opened?.into_inner();
                    if sent.is_err() || answers.message().await?.is_none() {
                        return Err(tonic::Status::aborted("containerd ended the write"));
                    }
                    self.stream = Some((sender, answers));
                }
            }
            Ok(())
        };
        match within(WRITE_DEADLINE, call).await {
            Ok(()) => Ok(true),
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            Err(status) => Err(status).with_context(|| format!("cannot write {} to the content store", self.digest)),
        }
    }
}

/// The labels by which a manifest or index keeps its children (`ChildGCLabels` in containerd's core/images).
fn children(text: &[u8]) -> anyhow::Result<HashMap<String, String>> {
    #[derive(Deserialize)]
    struct Document {
        config: Option<Child>,
        #[serde(default)]
        layers: Vec<Child>,
        #[serde(default)]
        manifests: Vec<Child>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Child {
        #[serde(default)]
        media_type: String,
        digest: String,
    }
    const PREFIX: &str = "containerd.io/gc.ref.content.";
    let document: Document = serde_json::from_slice(text)?;
    let mut labels = HashMap::new();
    if let Some(config) = document.config {
        labels.insert(format!("{PREFIX}config"), config.digest);
    }
    for (number, layer) in document.layers.into_iter().enumerate() {
        labels.insert(format!("{PREFIX}l.{number}"), layer.digest);
    }
    for (number, child) in document.manifests.into_iter().enumerate() {
        let kind = if child.media_type.contains("manifest.list") || child.media_type.contains("image.index") {
            ""
        } else {
            "m."
        };
        labels.insert(format!("{PREFIX}{kind}{number}"), child.digest);
    }
    Ok(labels)
}

fn internal(error: anyhow::Error) -> tonic::Status {
    tonic::Status::internal(format!("{error:#}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lazy::image::tests::texts;

    #[test]
    fn children_are_kept_as_containerd_does() {
        let (manifest, config) = texts(&["a", "b"]);
        let labels = children(&manifest).unwrap();
        assert_eq!(labels.len(), 3);
        assert_eq!(labels["containerd.io/gc.ref.content.config"], Digest::of(&config).to_string());
        assert_eq!(labels["containerd.io/gc.ref.content.l.1"], Digest::of(b"b").to_string());
        let index = br#"{"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:1"},
            {"mediaType":"application/vnd.oci.image.index.v1+json","digest":"sha256:2"}]}"#;
        let labels = children(index).unwrap();
        assert_eq!(labels["containerd.io/gc.ref.content.m.0"], "sha256:1");
        assert_eq!(labels["containerd.io/gc.ref.content.1"], "sha256:2");
    }
}
