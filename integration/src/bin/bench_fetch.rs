//! `make bench-fetch`: what the way through the mesh costs, seen from one node: blobs that nobody knows against the registry itself,
//! and single chunks of a neighbour.
//!
//! docs/BENCHMARKS.md says how to read and repeat it.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use lab::image::layer::Attributes;
use lab::image::{Image, LayerWriter, noise};
use lab::measure::wait_until_complete;
use lab::network::Place;
use lab::pattern;
use lab::process;
use lab::report::{machine, median, publish};
use lab::sandbox::{self, Run};
use lab::scene::Scene;
use lab::tools::{Tools, workspace};
use layer::ChunkIndex;
use node::config::{
    CacheConfig, DiskShare, MtlsConfig, RegistriesConfig, RegistryConfig, SecurityConfig, SeederAddresses,
};
use node::layer::Layer;
use node::mesh::{self, Mesh};
use node::resolve::{Progress, Resolver};
use node::security::{Role, Security};
use node::source::BlobRef;
use node::{Node, NodeConfig, registry};
use tokio::sync::watch;

/// Times single fetches of one node.
#[derive(Parser)]
struct Arguments {
    /// Kilobytes of the blobs; may be given several times
    #[arg(long = "kilobytes", default_values_t = [1, 100, 1_000, 10_000, 100_000])]
    kilobytes: Vec<usize>,
    /// Pairs of each size; fewer of those that take long
    #[arg(long, default_value_t = 20)]
    pairs: usize,
    /// Speed of the links in Mbit/s
    #[arg(long, default_value_t = 1000)]
    speed: u32,
    /// Speed of the registry's links in Mbit/s
    #[arg(long, default_value_t = 200)]
    registry_speed: u32,
    /// Megabytes of the layer whose chunks are fetched one by one; 0: none
    #[arg(long, default_value_t = 256)]
    chunks: usize,
    /// Folder for state
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// The most bytes of one size that all pairs together move: what takes long is measured less often.
const BYTES_OF_SIZE: usize = 400_000_000;
/// Pairs at least.
const PAIRS_MIN: usize = 3;
/// How much of a layer is read at a time.
const READ_LEN: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    node::bound_malloc();
    let arguments = Arguments::parse();
    let folder = arguments.folder.clone().unwrap_or_else(|| workspace().join(".drover"));
    sandbox::run_main(&folder, |run| bench(&arguments, run))
}

fn bench(arguments: &Arguments, run: &Run) -> Result<()> {
    let clock = Instant::now();
    let say = |text: &str| eprintln!("[{:6.1} s] {text}", clock.elapsed().as_secs_f64());
    let tools = Tools::prepare(&say)?;
    let mut scene = Scene::private(run, tools, &run.folder().join("registry"))?;
    let mut text = format!("{}.\n\n", machine());
    if !arguments.kilobytes.is_empty() && arguments.pairs > 0 {
        text.push_str(&blobs(arguments, run, &mut scene, &say)?);
    }
    if arguments.chunks > 0 {
        text.push_str(&chunks(arguments, run, &mut scene, &say)?);
    }
    publish("bench-fetch", &text)
}

/// The times of one blob, in seconds.
#[derive(Clone, Copy)]
struct Pair {
    direct: f64,
    resolved: f64,
    node: f64,
}

/// Blobs that no seeder knows, through the node and straight from the registry.
fn blobs(arguments: &Arguments, run: &Run, scene: &mut Scene, say: &dyn Fn(&str)) -> Result<String> {
    let mut sizes = Vec::new();
    for (sort, &kilobytes) in arguments.kilobytes.iter().enumerate() {
        let size = kilobytes * 1000;
        let pairs = (BYTES_OF_SIZE / size).clamp(PAIRS_MIN, arguments.pairs.max(PAIRS_MIN));
        say(&format!("making {pairs} blobs of {kilobytes} kB"));
        // One more, with which everything warms up.
        let image = made(&run.folder().join(format!("blobs-{sort}")), size, pairs + usize::from(sort == 0), sort)?;
        sizes.push((kilobytes, image));
    }
    let server = scene.registry.as_ref().context("the private registry is missing")?;
    for (kilobytes, image) in &sizes {
        server.push(&scene.network, image, "bench/blobs", &format!("of-{kilobytes}"))?;
    }
    scene.start_seeder(true)?;
    scene.network.set_speed(arguments.speed)?;
    scene.network.set_speed_of(Place::Registry, arguments.registry_speed)?;
    let setup = Setup::new(run, scene, "blobs")?;
    let repository = "bench/blobs";
    let refs: Vec<(usize, Vec<BlobRef>)> = sizes
        .iter()
        .map(|(kilobytes, image)| Ok((*kilobytes, references(image, &setup.registry, repository)?)))
        .collect::<Result<_>>()?;
    let host = scene.network.add_node(901)?;
    say("fetching blobs");
    let measured = scene.network.at(host.place(), move || {
        runtime()?.block_on(async {
            let member = Member::start(&setup).await?;
            let direct = registry::Client::new(setup.registries(), registry::Options::default());
            let mut rows = Vec::new();
            let mut warm = true;
            for (kilobytes, blobs) in refs {
                let mut pairs = Vec::new();
                for (number, blob) in blobs.iter().enumerate() {
                    let pair = if number % 2 == 0 {
                        let direct = download(&direct, blob).await?;
                        let (resolved, node) = member.stream(blob).await?;
                        Pair { direct, resolved, node }
                    } else {
                        let (resolved, node) = member.stream(blob).await?;
                        Pair { direct: download(&direct, blob).await?, resolved, node }
                    };
                    if std::mem::take(&mut warm) {
                        continue;
                    }
                    pairs.push(pair);
                }
                rows.push((kilobytes, pairs));
            }
            member.node.shutdown().await;
            Ok(rows)
        })
    });
    let rows = measured.join().map_err(|_| anyhow::anyhow!("the node's thread panicked"))??;
    scene.stop_seeder();

    let mut text = format!(
        "A blob that neither seeder nor node knows, to its last byte: straight from the registry with the node's own client, on a \
         kept connection; and resolved and read whole through the node's layer, which the seeder ingests meanwhile (TLS, kept \
         connections). Pairs of the same blob, in turns. Links of {} Mbit/s, the registry's of {} Mbit/s.\n\n",
        arguments.speed, arguments.registry_speed
    );
    writeln!(
        text,
        "| blob | pairs | direct, median | p90 | resolved, median | through the node, median | p90 | difference, median | p90 |"
    )?;
    writeln!(text, "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
    for (kilobytes, pairs) in rows {
        let ms = |of: fn(&Pair) -> f64| pairs.iter().map(|pair| of(pair) * 1e3).collect::<Vec<_>>();
        let (direct, node, more) = (ms(|pair| pair.direct), ms(|pair| pair.node), ms(|pair| pair.node - pair.direct));
        writeln!(
            text,
            "| {kilobytes} kB | {} | {:.1} ms | {:.1} ms | {:.1} ms | {:.1} ms | {:.1} ms | {:+.1} ms | {:+.1} ms |",
            pairs.len(),
            median(direct.clone()),
            percentile(&direct, 90),
            median(ms(|pair| pair.resolved)),
            median(node.clone()),
            percentile(&node, 90),
            median(more.clone()),
            percentile(&more, 90),
        )?;
    }
    text.push('\n');
    Ok(text)
}

/// Single chunks of a layer that a neighbour has.
fn chunks(arguments: &Arguments, run: &Run, scene: &mut Scene, say: &dyn Fn(&str)) -> Result<String> {
    say("a neighbour gets an image");
    let size = arguments.chunks << 20;
    let image = noise::build(&run.folder().join("images"), &scene.tools.busybox.clone(), size)?;
    let server = scene.registry.as_ref().context("the private registry is missing")?;
    let reference = server.push(&scene.network, &image, "bench/noise", "1")?;
    scene.start_seeder(true)?;
    let neighbour = scene.drover_node("")?;
    neighbour.containerd().pull(&scene.network, "drover", &reference)?;
    wait_until_complete(&neighbour)?;
    scene.network.set_speed(arguments.speed)?;
    let setup = Setup::new(run, scene, "chunks")?;
    let blob = references(&image, &setup.registry, "bench/noise")?.pop().context("the image has no layers")?;
    let at = SocketAddr::new(scene.network.address(neighbour.place()).into(), 7071);
    let host = scene.network.add_node(902)?;
    say("fetching chunks");
    let measured = scene.network.at(host.place(), move || {
        let mut trips: Vec<f64> = Vec::new();
        for _ in 0..200 {
            let began = Instant::now();
            let _line = TcpStream::connect(at).context("cannot connect to the neighbour")?;
            trips.push(began.elapsed().as_secs_f64() * 1e3);
        }
        let times = runtime()?.block_on(async {
            let member = Member::start(&setup).await?;
            let layer = member.resolve(&blob).await?;
            let times = one_by_one(&layer, &member).await?;
            member.node.shutdown().await;
            anyhow::Ok(times)
        })?;
        Ok((trips, times))
    });
    let (trips, (times, counters)) = measured.join().map_err(|_| anyhow::anyhow!("the node's thread panicked"))??;
    drop(neighbour);
    let chunks = times.len();
    let mut text = format!(
        "{chunks} chunks of 128 KiB, which nothing makes smaller, one at a time in no order, read through the node's layer: asked of \
         the neighbour (a snapshotter) over TLS, checked, stored. Links of {} Mbit/s, which carry a chunk in {:.2} ms. From \
         neighbours {}, from the seeder {}, asked twice {}.\n\n",
        arguments.speed,
        131_072.0 * 8.0 / 1e3 / f64::from(arguments.speed),
        counters.peer.chunks,
        counters.seeder.chunks,
        counters.hedges,
    );
    writeln!(text, "| | p50 | p90 | p99 | most |")?;
    writeln!(text, "| --- | ---: | ---: | ---: | ---: |")?;
    for (name, times) in [("a connection is opened (one round trip)", &trips), ("a chunk is read", &times)] {
        writeln!(
            text,
            "| {name} | {:.2} ms | {:.2} ms | {:.2} ms | {:.2} ms |",
            percentile(times, 50),
            percentile(times, 90),
            percentile(times, 99),
            percentile(times, 100)
        )?;
    }
    Ok(text)
}

/// Milliseconds of each chunk's read, and what the node counted meanwhile.
async fn one_by_one(layer: &Arc<Layer>, member: &Member) -> Result<(Vec<f64>, node::counters::CounterValues)> {
    let count = layer.geometry().chunk_count();
    let read = async |chunk: u32| {
        let range = layer.geometry().range(ChunkIndex(chunk));
        let began = Instant::now();
        layer.read(range).await.context("a read failed")?;
        anyhow::Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    // From an odd stride every chunk is met once; the first ones warm up, until the neighbour is known and gives some.
    let stride = (0..).map(|more| count / 3 + more).find(|stride| gcd(*stride, count) == 1).unwrap_or(1);
    let mut order = (0..count).map(|number| (u64::from(number) * u64::from(stride) % u64::from(count)) as u32);
    let deadline = Instant::now() + PATIENCE;
    while layer.counters().peer.chunks < 8 {
        ensure!(Instant::now() < deadline, "no neighbour gives anything: {:?}", member.mesh.watch().standing());
        read(order.next().context("the layer is too small")?).await?;
    }
    let before = layer.counters();
    let mut times = Vec::new();
    for chunk in order {
        times.push(read(chunk).await?);
    }
    let mut counters = layer.counters();
    counters.peer.chunks -= before.peer.chunks;
    counters.seeder.chunks -= before.seeder.chunks;
    counters.hedges -= before.hedges;
    Ok((times, counters))
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A node in this process needs this.
struct Setup {
    root: PathBuf,
    seeder: String,
    registry: String,
    files: MtlsConfig,
}

impl Setup {
    fn new(run: &Run, scene: &Scene, name: &str) -> Result<Self> {
        let folder = run.folder().join("certificates");
        let mut issue = Command::new(&scene.tools.seeder);
        process::run(issue.args(["ca", "issue", "--dir"]).arg(&folder).args(["--role", "node", name]))?;
        let file = |name: String| folder.join(name);
        Ok(Self {
            root: run.folder().join(format!("member-{name}")),
            seeder: scene.seeder.as_ref().context("no seeder runs")?.address().to_owned(),
            registry: scene.registry.as_ref().context("the private registry is missing")?.host(),
            files: MtlsConfig {
                ca: file("ca.crt".to_owned()),
                certificate: file(format!("{name}.crt")),
                key: file(format!("{name}.key")),
            },
        })
    }

    fn registries(&self) -> RegistriesConfig {
        let plain = RegistryConfig { plain_http: true, ..RegistryConfig::default() };
        RegistriesConfig { config_path: Vec::new(), hosts: [(self.registry.clone(), plain)].into() }
    }
}

/// A node of the mesh in this process, with an engine as the snapshotter has it.
struct Member {
    node: Arc<Node>,
    resolver: Resolver,
    mesh: Mesh,
}

impl Member {
    /// In the mesh when this returns.
    async fn start(setup: &Setup) -> Result<Self> {
        let config = SecurityConfig::Mtls(setup.files.clone());
        let security = Security::load(&config, Role::Node, Path::new("/nonexistent"))?;
        let cache = CacheConfig { keep_free: DiskShare::Bytes(256 << 20), ..CacheConfig::default() };
        // Only what is asked for is fetched.
        let config = NodeConfig { share: true, fill: false, readahead: 0, cache, ..NodeConfig::new(&setup.root) };
        let node = Node::open(config)?;
        let seeders = SeederAddresses::new([setup.seeder.clone()])?;
        let resolver = Resolver::new(node.clone(), &seeders, &security, &setup.registries());
        let options = mesh::Options {
            listen: "0.0.0.0:7071".to_owned(),
            address: String::new(),
            zone: String::new(),
            leech: false,
            upload_rate: 0,
        };
        let mesh = Mesh::start(&node, options, security, resolver.seeders().clone());
        let deadline = Instant::now() + PATIENCE;
        while mesh.watch().standing().seeders.is_empty() {
            ensure!(Instant::now() < deadline, "no line to the seeder");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(Self { node, resolver, mesh })
    }

    async fn resolve(&self, blob: &BlobRef) -> Result<Arc<Layer>> {
        let (progress, _) = watch::channel(Progress::default());
        self.resolver.resolve(blob, progress).await.context("the layer does not resolve")
    }

    /// Seconds until a blob is resolved, and until every byte of its device was read besides.
    async fn stream(&self, blob: &BlobRef) -> Result<(f64, f64)> {
        let began = Instant::now();
        let layer = self.resolve(blob).await?;
        let resolved = began.elapsed().as_secs_f64();
        let size = layer.header().device_size();
        let mut at = 0;
        while at < size {
            let end = (at + READ_LEN).min(size);
            layer.read(at..end).await.context("a read failed")?;
            at = end;
        }
        Ok((resolved, began.elapsed().as_secs_f64()))
    }
}

/// Seconds until a blob came from the registry.
async fn download(client: &registry::Client, blob: &BlobRef) -> Result<f64> {
    let began = Instant::now();
    let mut body = client.blob(blob, 0, None).await.context("the registry does not give a blob")?;
    let mut came = 0;
    while let Some(bytes) = body.next().await.context("the registry breaks off")? {
        came += bytes.len() as u64;
    }
    let took = began.elapsed().as_secs_f64();
    if came != blob.size {
        bail!("{came} bytes of {}", blob.size);
    }
    Ok(took)
}

/// An image of `count` layers, each of one file of about `size` bytes that nothing makes smaller.
fn made(folder: &Path, size: usize, count: usize, sort: usize) -> Result<Image> {
    let mut layers = Vec::new();
    for number in 0..count {
        let mut contents = vec![0; size];
        pattern::fill((sort * 1000 + number) as u64, 0, &mut contents);
        let mut layer = LayerWriter::create(folder, "blob")?;
        layer.file("noise", Attributes::root(0o644), &contents)?;
        layers.push(layer.finish()?);
    }
    Image::assemble(folder, &layers, "/bin")
}

fn references(image: &Image, registry: &str, repository: &str) -> Result<Vec<BlobRef>> {
    let blob = |blob: &lab::image::Blob| {
        Ok(BlobRef {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            digest: blob.digest.parse()?,
            size: blob.size,
            media_type: blob.media_type.clone(),
            urls: Vec::new(),
        })
    };
    image.layers.iter().map(blob).collect()
}

/// Its threads are at the place of the thread that makes it.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("no runtime")
}

/// The value that so many percent do not exceed.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let at = (values.len() * percent).div_ceil(100).max(1) - 1;
    values.get(at).copied().unwrap_or(f64::NAN)
}
