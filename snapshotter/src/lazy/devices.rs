//! The layers of this node as files of the device mount.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;

use bytes::Bytes;
use layer::Digest;
use node::Node;
use node::layer::Layer;
use node::reader::ReadError;
use parking_lot::Mutex;

use crate::fuse::{DeviceAttributes, Devices, Failure, NodeId, ParkedReply, Reply};

/// One file a layer: its name is the diffID in hex, its node the layer's number.
#[derive(Debug)]
pub struct LayerDevices(pub Arc<Node>);

impl LayerDevices {
    fn layer(&self, node: NodeId) -> Option<Arc<Layer>> {
        self.0.layer_by_number(node.layer()?)
    }
}

impl Devices for LayerDevices {
    fn lookup(&self, name: &OsStr) -> Option<DeviceAttributes> {
        attributes(&*self.0.layer(Digest::from_hex(name.to_str()?).ok()?)?)
    }

    fn attributes(&self, node: NodeId) -> Option<DeviceAttributes> {
        attributes(&*self.layer(node)?)
    }

    fn list(&self) -> Vec<(OsString, NodeId)> {
        self.0
            .layers()
            .into_iter()
            .filter_map(|layer| Some((layer.header().diff_id().hex().into(), NodeId::of_layer(layer.number())?)))
            .collect()
    }

    fn disk_use(&self) -> (u64, u64) {
        let used = self.0.disk_use();
        (used.taken, used.free)
    }

    fn read(&self, node: NodeId, offset: u64, size: u32, reply: Reply) {
        let Some(layer) = self.layer(node) else {
            return reply.failure(Failure::Stale);
        };
        let size = size as usize;
        let end = layer.header().device_size();
        let range = offset.min(end)..(offset + size as u64).min(end);
        tracing::trace!(layer = layer.number(), offset, size, "read");
        let mut bytes = Vec::with_capacity(size);
        match layer.read_now(range.clone(), &mut bytes) {
            Some(Ok(())) => {
                bytes.resize(size, 0);
                return reply.bytes(&bytes);
            }
            Some(Err(error)) => {
                tracing::warn!(layer = %layer.header().diff_id(), %error, "cannot read a device");
                return reply.failure(Failure::Failed);
            }
            None => drop(bytes),
        }
        let reply = reply.park();
        if reply.is_answered() {
            return;
        }
        // Dropping the wait ends it. The request's place in the session's table keeps it alive until the request is answered
        // or its caller is being killed.
        let slot: Arc<Mutex<Option<_>>> = Arc::default();
        reply.on_cancel({
            let slot = slot.clone();
            move || drop(slot.lock().take())
        });
        let wait = layer.read_with(range, Box::new(move |result| answer(reply, size, result)));
        *slot.lock() = Some(wait);
    }
}

/// The driver has logged why, once for all waiters of the chunk.
fn answer(reply: ParkedReply, size: usize, result: Result<Bytes, ReadError>) {
    match result {
        Ok(bytes) if bytes.len() == size => reply.bytes(&bytes),
        Ok(bytes) => reply.slices(&[&bytes, &vec![0; size.saturating_sub(bytes.len())]]),
        Err(_) => reply.failure(Failure::Failed),
    }
}

fn attributes(layer: &Layer) -> Option<DeviceAttributes> {
    // EROFS maps whole 512-byte blocks: a device whose tar ends inside one is shown with the block's rest as zeros.
    let size = layer.header().device_size().next_multiple_of(512);
    Some(DeviceAttributes { node: NodeId::of_layer(layer.number())?, size })
}
