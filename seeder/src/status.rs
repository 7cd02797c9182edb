//! `drover-seeder status`: what the store holds, and what the daemon gave of it.

use std::collections::HashMap;

use anyhow::Context;
use bytesize::ByteSize;
use layer::Digest;
use node::ingest::store;
use node::mesh::tracker;
use proto::drover::seeder::v1::{Layer, StatusResponse};

use crate::config::Config;

/// Prints a line for each known layer.
pub(crate) fn run(config: &Config) -> anyhow::Result<()> {
    let layers =
        store::list(&config.root).with_context(|| format!("cannot read the store {}", config.root.display()))?;
    let daemon = ask(config)?;
    let given: HashMap<&str, &Layer> =
        daemon.iter().flat_map(|daemon| &daemon.layers).map(|layer| (layer.blob.as_str(), layer)).collect();
    let mut total = 0;
    for blob in &layers {
        match store::header(&config.root, *blob) {
            Ok(header) => {
                total += header.blob_size();
                let (size, device) = (ByteSize::b(header.blob_size()), ByteSize::b(header.device_size()));
                print!("{blob}  blob {size}  device {device}  diffID {}", header.diff_id());
                println!("{}", line(*blob, header.blob_size(), &given));
            }
            Err(error) => println!("{blob}  cannot be used: {error}"),
        }
    }
    let taken = store::disk_use(&config.root);
    println!("{} layers, {} of blobs, {} on disk", layers.len(), ByteSize::b(total), ByteSize::b(taken));
    match daemon {
        Some(daemon) => println!("{} nodes in the mesh", daemon.nodes),
        None => println!("no daemon serves them"),
    }
    Ok(())
}

/// What the daemon says, if one runs.
fn ask(config: &Config) -> anyhow::Result<Option<StatusResponse>> {
    let socket = config.socket();
    if std::os::unix::net::UnixStream::connect(&socket).is_err() {
        return Ok(None);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime.block_on(tracker::status::ask(socket.clone()));
    answer.map(Some).with_context(|| format!("the daemon at {} does not answer", socket.display()))
}

/// Who has a layer, and how often it was sent since the daemon started.
fn line(blob: Digest, blob_size: u64, given: &HashMap<&str, &Layer>) -> String {
    let Some(layer) = given.get(blob.to_string().as_str()) else { return String::new() };
    let copies = layer.sent_bytes as f64 / blob_size.max(1) as f64;
    format!("  nodes {}  sent {} ({copies:.2} of the blob)", layer.members, ByteSize::b(layer.sent_bytes))
}
