//! The text of `drover-snapshotter status`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

use bytesize::ByteSize;
use proto::drover::node::v1::{Image, Layer, LayerState, Mesh, StatusResponse};

/// Writes `status` for people: an image a paragraph, a layer a line where `layers` asks for it.
pub fn render(status: &StatusResponse, layers: bool) -> String {
    let mut text = String::new();
    write_status(&mut text, status, layers).expect("writing to a string does not fail");
    text
}

fn write_status(out: &mut String, status: &StatusResponse, layers: bool) -> fmt::Result {
    let most = if status.bytes_max > 0 { format!(" of at most {}", size(status.bytes_max)) } else { String::new() };
    let (disk, devices) = (size(status.disk_bytes), size(status.bytes_here));
    writeln!(out, "drover-snapshotter {}, {disk} on disk, {devices}{most} in the devices of layers", status.version)?;
    if !status.not_lazy.is_empty() {
        writeln!(out, "no layer can be lazy on this node: {}", status.not_lazy)?;
    }
    if let Some(mesh) = &status.mesh {
        write_mesh(out, mesh)?;
    }
    let quarantined: BTreeSet<&str> = status
        .images
        .iter()
        .flat_map(|image| &image.layers)
        .filter(|layer| layer.state() == LayerState::Quarantined)
        .map(|layer| layer.blob.as_str())
        .collect();
    if !quarantined.is_empty() {
        writeln!(out, "quarantined layers: {}; no new container is made on them", quarantined.len())?;
    }
    let rotten = status.counters.as_ref().map_or(0, |counters| counters.rotten_chunks);
    if rotten > 0 {
        writeln!(out, "chunks that were damaged on this disk and are fetched again: {rotten}; look after the disk")?;
    }
    if status.images.is_empty() {
        writeln!(out, "no images")?;
    }
    for image in &status.images {
        write_image(out, image, layers)?;
    }
    Ok(())
}

fn write_mesh(out: &mut String, mesh: &Mesh) -> fmt::Result {
    if mesh.address.is_empty() {
        return writeln!(out, "mesh: no seeder has answered yet");
    }
    let lines = if mesh.seeders.is_empty() { "no seeder".to_owned() } else { mesh.seeders.join(", ") };
    let (neighbours, given) = (mesh.neighbours, size(mesh.given_bytes));
    writeln!(
        out,
        "mesh: {} with a line to {lines}, {neighbours} neighbours, {given} given to other nodes",
        mesh.address
    )
}

fn write_image(out: &mut String, image: &Image, layers: bool) -> fmt::Result {
    let lazy: Vec<&Layer> = image.layers.iter().filter(|layer| layer.state() != LayerState::Ordinary).collect();
    let (here, whole) =
        lazy.iter().fold((0, 0), |(here, whole), layer| (here + layer.bytes_here, whole + layer.device_size));
    writeln!(out, "\n{}", image.name)?;
    writeln!(
        out,
        "  {}: {} of {} layers lazy, {} of {} here{}",
        image_state(image),
        lazy.len(),
        image.layers.len(),
        size(here),
        size(whole),
        by_source(image.layers.iter())
    )?;
    for (number, layer) in image.layers.iter().enumerate() {
        // A layer that is not as it should be is shown always.
        if layers || !layer.reason.is_empty() {
            write_layer(out, number + 1, layer)?;
        }
    }
    Ok(())
}

fn write_layer(out: &mut String, number: usize, layer: &Layer) -> fmt::Result {
    let name = if layer.blob.is_empty() { &layer.snapshot } else { &layer.blob };
    write!(out, "  {number:3} {name} {}", state_name(layer.state()))?;
    if layer.state() != LayerState::Ordinary {
        write!(out, ", {} of {}{}", size(layer.bytes_here), size(layer.device_size), by_source([layer].into_iter()))?;
    }
    if !layer.reason.is_empty() {
        write!(out, ": {}", layer.reason)?;
    }
    writeln!(out)
}

/// The worst state of a lazy layer names the image; an image without one is ordinary.
fn image_state(image: &Image) -> &'static str {
    let has = |state| image.layers.iter().any(|layer| layer.state() == state);
    let worst = [LayerState::Broken, LayerState::Quarantined, LayerState::Partial, LayerState::Complete]
        .into_iter()
        .find(|state| has(*state));
    match worst {
        Some(state) => state_name(state),
        None => state_name(LayerState::Ordinary),
    }
}

pub(super) fn state_name(state: LayerState) -> &'static str {
    match state {
        LayerState::Ordinary => "ordinary",
        LayerState::Partial => "partial",
        LayerState::Complete => "complete",
        LayerState::Quarantined => "quarantined",
        LayerState::Broken => "broken",
    }
}

fn by_source<'a>(layers: impl Iterator<Item = &'a Layer>) -> String {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (source, bytes) in layers.flat_map(|layer| &layer.bytes_by_source) {
        *sums.entry(source).or_default() += bytes;
    }
    let parts: Vec<String> = sums
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(source, bytes)| format!("{} from {source}", size(bytes)))
        .collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use proto::drover::node::v1::Counters;

    use super::*;

    #[test]
    fn shows_sources_and_reasons() {
        let lazy = Layer {
            snapshot: "sha256:aa".into(),
            state: LayerState::Partial.into(),
            blob: "sha256:bb".into(),
            device_size: 4 << 20,
            bytes_here: 1 << 20,
            bytes_by_source: [("seeder".to_owned(), 1 << 19), ("registry".to_owned(), 0)].into(),
            reason: String::new(),
        };
        let ordinary =
            Layer { snapshot: "default/7/sha256:cc".into(), reason: "no seeder answered".into(), ..Layer::default() };
        let status = StatusResponse {
            version: "0.1.0".into(),
            images: vec![Image { name: "registry/demo:v1".into(), layers: vec![lazy, ordinary] }],
            bytes_here: 1 << 20,
            bytes_max: 8 << 20,
            disk_bytes: 2 << 20,
            ..StatusResponse::default()
        };
        let text = render(&status, false);
        assert!(text.contains("2.0 MiB on disk, 1.0 MiB of at most 8.0 MiB in the devices"), "{text}");
        assert!(
            text.contains("partial: 1 of 2 layers lazy, 1.0 MiB of 4.0 MiB here (512.0 KiB from seeder)"),
            "{text}"
        );
        assert!(text.contains("default/7/sha256:cc ordinary: no seeder answered"), "{text}");
        assert!(!text.contains("sha256:bb"), "{text}");
        assert!(render(&status, true).contains("sha256:bb partial"));
        assert!(!text.contains("mesh"), "{text}");
    }

    #[test]
    fn shows_what_is_quarantined_and_rotten() {
        let quarantined = Layer {
            state: LayerState::Quarantined.into(),
            blob: "sha256:bb".into(),
            device_size: 4 << 20,
            bytes_here: 1 << 20,
            reason: "chunk 7 came wrong".into(),
            ..Layer::default()
        };
        let complete = Layer { state: LayerState::Complete.into(), blob: "sha256:cc".into(), ..Layer::default() };
        let image = |name: &str| Image { name: name.into(), layers: vec![complete.clone(), quarantined.clone()] };
        let mut status = StatusResponse {
            images: vec![image("registry/a:v1"), image("registry/b:v1")],
            ..StatusResponse::default()
        };
        let text = render(&status, false);
        assert!(text.contains("quarantined layers: 1; no new container is made on them"), "{text}");
        assert!(text.contains("registry/a:v1\n  quarantined: 2 of 2 layers lazy"), "{text}");
        assert!(text.contains("    2 sha256:bb quarantined, 1.0 MiB of 4.0 MiB: chunk 7 came wrong"), "{text}");
        assert!(!text.contains("sha256:cc") && !text.contains("damaged"), "{text}");
        status.counters = Some(Counters { rotten_chunks: 2, ..Counters::default() });
        assert!(render(&status, false).contains("damaged on this disk and are fetched again: 2;"));
    }

    #[test]
    fn shows_the_mesh() {
        let text = |mesh| render(&StatusResponse { mesh: Some(mesh), ..StatusResponse::default() }, false);
        assert!(text(Mesh::default()).contains("mesh: no seeder has answered yet"));
        let mut mesh = Mesh {
            address: "10.0.0.7:7071".into(),
            seeders: vec!["10.0.0.1:7070".into(), "10.0.0.2:7070".into()],
            neighbours: 12,
            given_bytes: 3 << 20,
        };
        let want = "mesh: 10.0.0.7:7071 with a line to 10.0.0.1:7070, 10.0.0.2:7070, 12 neighbours, 3.0 MiB given to other nodes";
        assert!(text(mesh.clone()).contains(want), "{}", text(mesh));
        mesh.seeders.clear();
        assert!(text(mesh).contains("with a line to no seeder, 12 neighbours"));
    }
}
