//! What to configure in containerd so that its pulls say which image they are of.

use std::collections::HashSet;

use parking_lot::Mutex;

use crate::containerd::about::{About, PluginConfig, Version};

/// Namespace of the CRI, and so of Kubernetes.
const CRI_NAMESPACE: &str = "k8s.io";
/// Snapshotter names that are remembered: there is one, seldom two.
const NAMES_MAX: usize = 64;

/// Says once for each containerd and reason which key is missing.
#[derive(Debug)]
pub struct Hints {
    about: About,
    asked: Mutex<HashSet<(String, bool)>>,
    said: Mutex<HashSet<String>>,
}

impl Hints {
    /// Hints on the configuration of the containerd that `about` asks.
    pub fn new(about: About) -> Self {
        Self { about, asked: Mutex::default(), said: Mutex::default() }
    }

    /// A pull into `snapshotter` came without labels of its image. Warns if a key of containerd's configuration is the reason. It stays
    /// lazy: the image is found in the content store, which takes some milliseconds more and does not know a registry's port.
    pub async fn on_missing_labels(&self, snapshotter: &str, namespace: &str) {
        let is_cri = namespace == CRI_NAMESPACE;
        {
            let mut asked = self.asked.lock();
            if asked.len() >= NAMES_MAX || !asked.insert((snapshotter.to_owned(), is_cri)) {
                return;
            }
        }
        let answers =
            async { Ok::<_, tonic::Status>((self.about.version().await?, self.about.snapshotter(snapshotter).await?)) };
        match answers.await {
            Ok((Some(version), config)) => {
                if let Some(hint) = hint(version, &config.unwrap_or_default(), is_cri, snapshotter)
                    && self.said.lock().insert(hint.clone())
                {
                    tracing::warn!(containerd = %version, snapshotter, "{hint}");
                }
            }
            Ok((None, _)) => {}
            Err(error) => {
                tracing::debug!(%error, "containerd does not say how it is configured");
                // Asked again with the next pull.
                self.asked.lock().remove(&(snapshotter.to_owned(), is_cri));
            }
        }
    }
}

/// The key that is missing; `None` where the client is the reason, which no key can change.
fn hint(version: Version, config: &PluginConfig, is_cri: bool, snapshotter: &str) -> Option<String> {
    const NO_LABELS: &str =
        "pulls come without labels of their images, which are looked up in containerd's content store instead";
    let from = |major, minor| version >= Version { major, minor };
    if from(2, 1) && !config.has_annotations {
        return Some(format!(
            "{NO_LABELS}: set enable_remote_snapshot_annotations = \"true\" in [proxy_plugins.{snapshotter}.exports]"
        ));
    }
    let table = match is_cri {
        // Only a client that pulls by itself leaves the labels out.
        false => return None,
        true if from(2, 0) => "[plugins.'io.containerd.cri.v1.images']",
        true => "[plugins.\"io.containerd.grpc.v1.cri\".containerd]",
    };
    Some(format!("{NO_LABELS}: set disable_snapshot_annotations = false in {table}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(major: u32, minor: u32, has_annotations: bool, is_cri: bool) -> Option<String> {
        let config = PluginConfig { has_annotations, remaps_ids: false };
        hint(Version { major, minor }, &config, is_cri, "drover")
    }

    #[test]
    fn names_the_key_of_this_version() {
        let export = named(2, 1, false, true).unwrap();
        assert!(
            export.contains("enable_remote_snapshot_annotations") && export.contains("[proxy_plugins.drover.exports]")
        );
        assert_eq!(named(2, 4, false, false), Some(export));
        let images = named(2, 3, true, true).unwrap();
        assert!(images.contains("disable_snapshot_annotations") && images.contains("io.containerd.cri.v1.images"));
        assert_eq!(named(2, 0, false, true), Some(images));
        let old = named(1, 7, false, true).unwrap();
        assert!(old.contains("io.containerd.grpc.v1.cri"));
        assert_eq!(named(1, 6, true, true), Some(old));
    }

    #[test]
    fn says_nothing_where_no_key_helps() {
        for (major, minor, has_annotations) in [(1, 6, false), (1, 7, true), (2, 0, false), (2, 3, true)] {
            assert_eq!(named(major, minor, has_annotations, false), None);
        }
    }
}
