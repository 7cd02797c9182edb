//! The figures of `drover-snapshotter status --metrics`, in Prometheus' text format.

use std::fmt::{self, Display, Write};

use proto::drover::node::v1::{Layer, LayerState, StatusResponse};

/// Writes `status` for Prometheus. Counters count from the daemon's start.
pub fn metrics(status: &StatusResponse) -> String {
    let mut text = String::new();
    write_metrics(&mut text, status).expect("writing to a string does not fail");
    text
}

fn write_metrics(out: &mut String, status: &StatusResponse) -> fmt::Result {
    let mut out = Metrics(out);
    let counters = status.counters.clone().unwrap_or_default();
    let version = [("version", status.version.as_str())];
    out.gauge("drover_info", "The daemon that answered; always 1.")?.sample(&version, 1)?;
    out.gauge("drover_lazy", "Whether layers can be lazy on this node.")?
        .value(u8::from(status.not_lazy.is_empty()))?;

    out.gauge("drover_disk_bytes", "Bytes that everything below the root takes.")?.value(status.disk_bytes)?;
    out.gauge("drover_device_bytes", "Bytes that the devices of layers take.")?.value(status.bytes_here)?;
    if status.bytes_max > 0 {
        out.gauge("drover_device_bytes_max", "Most bytes that the devices may take now.")?.value(status.bytes_max)?;
    }
    let mut metric =
        out.gauge("drover_layers", "Layers of images, by their state; one that two images share counts twice.")?;
    let layers: Vec<&Layer> = status.images.iter().flat_map(|image| &image.layers).collect();
    for state in STATES {
        let count = layers.iter().filter(|layer| layer.state() == state).count();
        metric.sample(&[("state", super::render::state_name(state))], count)?;
    }

    let mut metric =
        out.counter("drover_fetched_bytes_total", "Bytes of chunks that came, by the kind of their source.")?;
    let mut by_source: Vec<(&String, &u64)> = counters.bytes_by_source.iter().collect();
    by_source.sort();
    for (source, bytes) in by_source {
        metric.sample(&[("source", source)], bytes)?;
    }
    let counted = [
        ("drover_wrong_chunks_total", "Chunks that came and were not what the index says.", counters.wrong_chunks),
        ("drover_rotten_chunks_total", "Chunks that were damaged or lost on this disk.", counters.rotten_chunks),
        ("drover_unstored_chunks_total", "Chunks that the disk did not take.", counters.unstored_chunks),
        (
            "drover_expired_chunks_total",
            "Chunks that did not come before their deadline while reads waited for them.",
            counters.expired_chunks,
        ),
        ("drover_failed_reads_total", "Reads that failed.", counters.failed_reads),
        ("drover_waited_reads_total", "Reads that waited for chunks and got them.", counters.waited_reads),
        ("drover_evicted_bytes_total", "Bytes that were taken off the disk to make room.", counters.evicted_bytes),
    ];
    for (name, help, value) in counted {
        out.counter(name, help)?.value(value)?;
    }
    let waited = std::time::Duration::from_micros(counters.waited_micros).as_secs_f64();
    out.counter("drover_waited_seconds_total", "How long reads waited for chunks that they got, in all.")?
        .value(waited)?;

    let Some(mesh) = &status.mesh else { return Ok(()) };
    out.gauge("drover_mesh_seeders", "Seeders that the node has a line to.")?.value(mesh.seeders.len())?;
    out.gauge("drover_mesh_neighbours", "Nodes that the node has a line to, or that have one to it.")?
        .value(mesh.neighbours)?;
    out.counter("drover_mesh_given_bytes_total", "Bytes of chunks that were given to other nodes.")?
        .value(mesh.given_bytes)
}

const STATES: [LayerState; 5] =
    [LayerState::Ordinary, LayerState::Partial, LayerState::Complete, LayerState::Quarantined, LayerState::Broken];

struct Metrics<'a>(&'a mut String);

struct Metric<'a> {
    out: &'a mut String,
    name: &'static str,
}

impl Metrics<'_> {
    fn gauge(&mut self, name: &'static str, help: &str) -> Result<Metric<'_>, fmt::Error> {
        self.metric(name, help, "gauge")
    }

    fn counter(&mut self, name: &'static str, help: &str) -> Result<Metric<'_>, fmt::Error> {
        self.metric(name, help, "counter")
    }

    fn metric(&mut self, name: &'static str, help: &str, kind: &str) -> Result<Metric<'_>, fmt::Error> {
        writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}")?;
        Ok(Metric { out: self.0, name })
    }
}

impl Metric<'_> {
    fn value(&mut self, value: impl Display) -> fmt::Result {
        writeln!(self.out, "{} {value}", self.name)
    }

    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) -> fmt::Result {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
        writeln!(self.out, "{}{{{}}} {value}", self.name, labels.join(","))
    }
}

fn escape(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use proto::drover::node::v1::{Counters, Image, Mesh};

    use super::*;

    #[test]
    fn says_each_figure_once_in_prometheus_format() {
        let layer = |state: LayerState| Layer { state: state.into(), ..Layer::default() };
        let status = StatusResponse {
            version: "0.1.0\"\n".into(),
            images: vec![
                Image { layers: vec![layer(LayerState::Quarantined), layer(LayerState::Complete)], ..Image::default() },
                Image { layers: vec![layer(LayerState::Complete)], ..Image::default() },
            ],
            bytes_here: 5,
            bytes_max: 9,
            disk_bytes: 7,
            mesh: Some(Mesh { neighbours: 12, given_bytes: 3, seeders: vec!["a".into()], ..Mesh::default() }),
            counters: Some(Counters {
                bytes_by_source: [("seeder".to_owned(), 100), ("registry".to_owned(), 0)].into(),
                wrong_chunks: 1,
                rotten_chunks: 2,
                unstored_chunks: 3,
                expired_chunks: 4,
                failed_reads: 5,
                waited_reads: 6,
                waited_micros: 1_500_000,
                evicted_bytes: 8,
            }),
            ..StatusResponse::default()
        };
        let text = metrics(&status);
        for line in [
            r#"drover_info{version="0.1.0\"\n"} 1"#,
            "drover_lazy 1",
            "drover_disk_bytes 7",
            "drover_device_bytes 5",
            "drover_device_bytes_max 9",
            r#"drover_layers{state="quarantined"} 1"#,
            r#"drover_layers{state="complete"} 2"#,
            r#"drover_layers{state="partial"} 0"#,
            r#"drover_fetched_bytes_total{source="seeder"} 100"#,
            r#"drover_fetched_bytes_total{source="registry"} 0"#,
            "drover_wrong_chunks_total 1",
            "drover_rotten_chunks_total 2",
            "drover_unstored_chunks_total 3",
            "drover_expired_chunks_total 4",
            "drover_failed_reads_total 5",
            "drover_waited_reads_total 6",
            "drover_waited_seconds_total 1.5",
            "drover_evicted_bytes_total 8",
            "drover_mesh_seeders 1",
            "drover_mesh_neighbours 12",
            "drover_mesh_given_bytes_total 3",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line} in\n{text}");
        }
        let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE ")).collect();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        for sample in samples {
            let name = sample.split(['{', ' ']).next().unwrap();
            let described = |line: &&&str| line.split(' ').nth(2) == Some(name);
            assert_eq!(types.iter().filter(described).count(), 1, "{name}");
            let kind = types.iter().find(described).unwrap().rsplit(' ').next().unwrap();
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        }
        assert!(!metrics(&StatusResponse::default()).contains("mesh"));
    }
}
