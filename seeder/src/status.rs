//! `drover-seeder status`: what the store holds.

use anyhow::Context;
use bytesize::ByteSize;
use node::ingest::store;

use crate::config::Config;

/// Prints a line for each known layer.
pub(crate) fn run(config: &Config) -> anyhow::Result<()> {
    let layers =
        store::list(&config.root).with_context(|| format!("cannot read the store {}", config.root.display()))?;
    let mut total = 0;
    for blob in &layers {
        match store::header(&config.root, *blob) {
            Ok(header) => {
                total += header.blob_size();
                let (size, device) = (ByteSize::b(header.blob_size()), ByteSize::b(header.device_size()));
                println!("{blob}  blob {size}  device {device}  diffID {}", header.diff_id());
            }
            Err(error) => println!("{blob}  cannot be used: {error}"),
        }
    }
    let taken = store::disk_use(&config.root);
    println!("{} layers, {} of blobs, {} on disk", layers.len(), ByteSize::b(total), ByteSize::b(taken));
    Ok(())
}
