//! Grants over real connections, with a registry that wants credentials.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use layer::ChunkIndex;
use proto::drover::grant::v1 as api;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::held::{Answer, Giver};
use super::*;
use crate::config::{CacheConfig, DiskShare, RegistriesConfig, SeederAddresses};
use crate::ingest::store::Store;
use crate::ingest::tests::{Sample, finished};
use crate::ingest::{self, Ingester, Phase, control};
use crate::layer::Layer;
use crate::mesh::peer::{PeerClient, PeerSource};
use crate::mesh::{Holders, Member, OwnAddress, Refused, Sharing};
use crate::registry;
use crate::registry::fake::FakeRegistry;
use crate::resolve::{Progress, ResolveError, Resolver};
use crate::security::clock::since_boot;
use crate::security::tests::TestCluster;
use crate::security::{Clock, Role, Security};
use crate::seeder::{self, SeederError};
use crate::serve::{self, Limits, Listener};
use crate::source::{BlobRef, BoxFuture, ChunkSink, Priority, Source, SourceError, WrongChunk};
use crate::{Node, NodeConfig};

const PATIENCE: Duration = Duration::from_secs(30);
const RIGHT: Option<&str> = Some("right");

/// A registry that wants credentials, and a seeder of it that demands grants.
struct Scene {
    cluster: TestCluster,
    registry: FakeRegistry,
    /// A registry of somebody else's, without credentials, that the seeder reaches as well.
    other: FakeRegistry,
    sample: Sample,
    blob: BlobRef,
    folder: tempfile::TempDir,
    ingester: Ingester,
    issuer: Issuer,
    address: String,
    _stop: DropGuard,
}

impl Scene {
    async fn new(seed: u32, registry_down: Duration) -> Self {
        let (registry, other) = (FakeRegistry::start().await, FakeRegistry::start().await);
        let (cluster, sample) = (TestCluster::new(), Sample::new(seed));
        registry.set(|behaviour| behaviour.credentials = Some(("user".to_owned(), "right".to_owned())));
        let blob = registry.put_blob(sample.blob.clone());
        let folder = tempfile::tempdir().unwrap();
        let security = cluster.security(Role::Seeder, "s");
        let store = Store::open(&folder.path().join("seeder")).unwrap();
        let mut config = registry_config(&registry, folder.path().join("s.json"), RIGHT);
        config.hosts.extend(other.config().hosts);
        let client = client(config);
        let options = ingest::Options { cache: whole_disk(), ..ingest::Options::default() };
        let ingester = Ingester::new(store, client, security.signer().unwrap(), options).unwrap();
        let options = issuer::Options { registry_down, ..issuer::Options::default() };
        let issuer = Issuer::new(ingester.clone(), &security, options).unwrap().unwrap();
        let router = serve::router(std::sync::Arc::new(ingester.clone()), 64);
        let router = Demand::of_seeder(&security, ingester.clone()).guard(router);
        let router = issuer::route(control::route(router, ingester.clone()), issuer.clone());
        let listener = Listener::bind("127.0.0.1:0", &security, Limits::default()).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        tokio::spawn(listener.serve(router, stop.clone()));
        Self { cluster, registry, other, sample, blob, folder, ingester, issuer, address, _stop: stop.drop_guard() }
    }

    /// The same with the layer known.
    async fn known(seed: u32, registry_down: Duration) -> Self {
        let scene = Self::new(seed, registry_down).await;
        scene.ingest(&scene.blob).await;
        scene
    }

    async fn ingest(&self, blob: &BlobRef) {
        let phase = finished(self.ingester.ask(blob).await.unwrap()).await;
        assert!(matches!(phase, Phase::Ready(_)), "{phase:?}");
    }

    fn config(&self, node: &str, password: Option<&str>) -> RegistriesConfig {
        registry_config(&self.registry, self.folder.path().join(format!("{node}.json")), password)
    }

    fn seeders(&self) -> SeederAddresses {
        SeederAddresses::new([self.address.clone()]).unwrap()
    }

    /// The seeders as the node `name` sees them, which knows where the layer is.
    fn client(&self, name: &str, password: Option<&str>) -> seeder::Client {
        self.client_of(self.cluster.security(Role::Node, name), name, password)
    }

    fn client_of(&self, security: Security, name: &str, password: Option<&str>) -> seeder::Client {
        let seeders = seeder::Client::new(&self.seeders(), security, seeder::Options::default());
        seeders.grants().show_credentials_of(client(self.config(name, password)));
        seeders.grants().note(&self.blob);
        seeders
    }

    /// A grant for the layer, for the node `name`.
    async fn grant(&self, name: &str) -> HeaderValue {
        self.client(name, RIGHT).grants().renew(self.blob.digest, None).await.unwrap()
    }

    async fn denial(&self, name: &str, password: Option<&str>) -> String {
        let error = self.client(name, password).grants().renew(self.blob.digest, None).await;
        error.expect_err("no grant is due").to_string()
    }

    fn node(&self, name: &str) -> std::sync::Arc<Node> {
        let config = NodeConfig::new(self.folder.path().join(name));
        Node::open(NodeConfig { fill: false, cache: whole_disk(), ..config }).unwrap()
    }

    async fn resolve(
        &self,
        node: &std::sync::Arc<Node>,
        name: &str,
        password: Option<&str>,
    ) -> Result<std::sync::Arc<Layer>, ResolveError> {
        self.resolve_as(&self.cluster.security(Role::Node, name), node, name, password).await
    }

    async fn resolve_as(
        &self,
        security: &Security,
        node: &std::sync::Arc<Node>,
        name: &str,
        password: Option<&str>,
    ) -> Result<std::sync::Arc<Layer>, ResolveError> {
        let registries = self.config(name, password);
        let resolver = Resolver::new(node.clone(), &self.seeders(), security, &registries);
        let (progress, _) = watch::channel(Progress::default());
        tokio::time::timeout(PATIENCE, resolver.resolve(&self.blob, progress)).await.expect("it ends")
    }
}

/// However full it is.
fn whole_disk() -> CacheConfig {
    CacheConfig { keep_free: DiskShare::Bytes(0), ..CacheConfig::default() }
}

fn registry_config(registry: &FakeRegistry, file: PathBuf, password: Option<&str>) -> RegistriesConfig {
    let auths = match password {
        Some(password) => serde_json::json!({ registry.host(): { "username": "user", "password": password } }),
        None => serde_json::json!({}),
    };
    std::fs::write(&file, serde_json::json!({ "auths": auths }).to_string()).unwrap();
    let mut config = registry.config();
    config.hosts.get_mut(&registry.host()).unwrap().docker_config = Some(file);
    config
}

fn client(config: RegistriesConfig) -> registry::Client {
    let options =
        registry::Options { connect_timeout: Duration::from_secs(2), stall_timeout: Duration::from_millis(500) };
    registry::Client::new(config, options)
}

fn opened(scene: &Scene, header: &HeaderValue) -> Grant {
    let verifier = scene.cluster.security(Role::Node, "reader").verifier();
    Grant::open(&of_header(header).unwrap(), &verifier).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_goes_to_those_who_could_pull_it_and_to_nobody_else() {
    for token in [false, true] {
        let scene = Scene::known(90, Duration::ZERO).await;
        scene.registry.set(|behaviour| behaviour.token = token);
        let node = scene.node("n1");
        let layer = scene.resolve(&node, "n1", RIGHT).await.unwrap();
        let bytes = tokio::time::timeout(PATIENCE, layer.read(0..1000)).await.unwrap().unwrap();
        assert_eq!(bytes, scene.sample.device[..1000]);

        // Others with the same credentials cost the registry nothing for a while.
        let before = scene.registry.requests();
        let second = scene.node("n2");
        scene.resolve(&second, "n2", RIGHT).await.unwrap();
        assert_eq!(scene.registry.requests(), before);

        for (name, password, why) in [("n3", Some("wrong"), "401"), ("n4", None, "docker_config")] {
            let node = scene.node(name);
            match scene.resolve(&node, name, password).await {
                Err(ResolveError::Seeder(SeederError::Ungranted { reason, .. })) => {
                    assert!(reason.contains(why) && !reason.contains("right"), "{reason}");
                }
                other => panic!("{other:?}"),
            }
            node.shutdown().await;
        }
        node.shutdown().await;
        second.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_public_layer_needs_no_credentials() {
    let scene = Scene::known(91, Duration::ZERO).await;
    scene.registry.set(|behaviour| behaviour.credentials = None);
    let node = scene.node("n");
    scene.resolve(&node, "n", None).await.unwrap();
    let sent = scene.registry.seen();
    assert!(sent.iter().rev().take(4).all(|request| !request.headers.contains_key("authorization")));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_layer_is_followed_with_a_grant_for_its_ingest() {
    let scene = Scene::new(92, Duration::ZERO).await;
    scene.registry.set(|behaviour| behaviour.pause = Duration::from_millis(5));
    let node = scene.node("n");
    let layer = scene.resolve(&node, "n", RIGHT).await.unwrap();
    assert!(layer.bytes_here() > 0, "nothing came while it was ingested");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_for_an_ingest_is_good_for_nothing_else() {
    let scene = Scene::new(93, Duration::ZERO).await;
    // It goes on until the end of the test.
    scene.registry.set(|behaviour| behaviour.stall_after = Some(1 << 20));
    begin(&scene, &scene.blob).await;
    let header = scene.grant("n").await;
    let grant = opened(&scene, &header);
    assert_eq!(grant.stage, Stage::Ingest);

    let caller = caller_of(&grant);
    let (seeder, node) = (scene.cluster.security(Role::Seeder, "s"), scene.cluster.security(Role::Node, "m"));
    let check = |demand: &Demand| demand.check(SystemTime::now(), Some(&caller), scene.blob.digest, Some(&header));
    assert_eq!(check(&Demand::of_seeder(&seeder, scene.ingester.clone())), Ok(()));
    let other = Demand::of_node(&node, scene.folder.path().join("grants"));
    assert_eq!(check(&other), Err(GrantError::OtherStage), "other nodes have the whole layer");

    // The name of the registry is the asker's word, and another one proves nothing yet.
    let seeders = scene.client("n2", RIGHT);
    seeders.grants().note(&scene.other.put_blob(scene.sample.blob.clone()));
    let grant = opened(&scene, &seeders.grants().renew(scene.blob.digest, None).await.unwrap());
    assert_eq!(grant.registry, scene.registry.host(), "the next place that was named");
}

/// Starts an ingest and waits until it reads.
async fn begin(scene: &Scene, blob: &BlobRef) {
    let phase = scene.ingester.ask(blob).await.unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while scene.ingester.flight(blob.digest).is_none_or(|flight| flight.frames().is_none()) {
        assert!(std::time::Instant::now() < deadline, "it does not begin");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(matches!(*phase.borrow(), Phase::Running(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_ingest_left_is_not_given_to_who_names_another_registry() {
    let scene = Scene::new(101, Duration::ZERO).await;
    // An ingest from the private registry broke off.
    let begun = scene.folder.path().join("seeder/incoming").join(scene.blob.digest.hex());
    std::fs::create_dir_all(&begun).unwrap();
    std::fs::write(begun.join("blob"), &scene.sample.blob[..2 << 20]).unwrap();
    let elsewhere = BlobRef { registry: scene.other.host(), ..scene.blob.clone() };
    scene.other.corrupt_blob(&elsewhere, vec![0; scene.sample.blob.len()]);
    scene.other.set(|behaviour| behaviour.stall_after = Some(1));
    begin(&scene, &elsewhere).await;
    let seeders =
        seeder::Client::new(&scene.seeders(), scene.cluster.security(Role::Node, "n"), seeder::Options::default());
    seeders.grants().note(&elsewhere);
    let error = seeders.grants().renew(scene.blob.digest, None).await.unwrap_err();
    assert!(error.contains("is being read"), "{error}");
}

fn caller_of(grant: &Grant) -> crate::security::tls::Caller {
    let validity = Duration::from_secs(3600);
    crate::security::tls::Caller { role: Role::Node, name: "n".to_owned(), validity, key: grant.key }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_the_askers_choice_must_have_the_very_bytes() {
    let scene = Scene::known(94, Duration::ZERO).await;
    let elsewhere = BlobRef { registry: scene.other.host(), ..scene.blob.clone() };
    // It says yes to everything, and knows how large the blob is.
    scene.other.corrupt_blob(&elsewhere, vec![0x1f; scene.sample.blob.len()]);
    let ask = || async {
        let seeders = scene.client("n", None);
        seeders.grants().note(&elsewhere);
        seeders.grants().renew(scene.blob.digest, None).await
    };
    let error = ask().await.unwrap_err();
    assert!(error.contains("is not the blob"), "{error}");
    scene.other.corrupt_blob(&elsewhere, scene.sample.blob.clone());
    scene.issuer.forget_answers();
    assert_eq!(opened(&scene, &ask().await.unwrap()).registry, scene.other.host());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_seeders_own_rights_are_nobody_elses() {
    let scene = Scene::known(95, Duration::ZERO).await;
    let seen = scene.registry.seen().len();
    assert!(scene.denial("n", Some("wrong")).await.contains("401"));
    let basic = |password: &str| {
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("user:{password}"));
        format!("Basic {encoded}")
    };
    let shown: Vec<_> = scene.registry.seen().split_off(seen);
    let shown: Vec<_> = shown.iter().filter_map(|request| request.headers.get("authorization")).collect();
    assert!(!shown.is_empty() && shown.iter().all(|value| *value == basic("wrong").as_str()), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_without_the_blob_gives_no_right_to_it() {
    let scene = Scene::known(96, Duration::ZERO).await;
    let seeders = scene.client("n", RIGHT);
    let other = scene.registry.put_blob(Sample::one_frame(1).blob);
    scene.ingest(&other).await;
    // The node may pull this one, and nothing else of the registry.
    seeders.grants().note(&other);
    let header = seeders.grants().renew(other.digest, None).await.unwrap();
    let caller = caller_of(&opened(&scene, &header));
    let node = scene.cluster.security(Role::Node, "m");
    let demand = Demand::of_node(&node, scene.folder.path().join("grants"));
    let check = |blob| demand.check(SystemTime::now(), Some(&caller), blob, Some(&header));
    assert_eq!(check(other.digest), Ok(()));
    assert_eq!(check(scene.blob.digest), Err(GrantError::OtherLayer));

    let security = scene.cluster.security(Role::Node, "n2");
    let seeders = seeder::Client::new(&scene.seeders(), security, seeder::Options::default());
    seeders.grants().show_credentials_of(client(scene.config("n2", RIGHT)));
    seeders.grants().note(&BlobRef { repository: "team/other".to_owned(), ..scene.blob.clone() });
    let error = seeders.grants().renew(scene.blob.digest, None).await.unwrap_err();
    assert!(error.contains("404"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_is_good_for_its_machine_its_layer_and_its_time() {
    let scene = Scene::known(97, Duration::ZERO).await;
    let header = scene.grant("n").await;
    let grant = opened(&scene, &header);
    assert_eq!((grant.registry.as_str(), grant.repository.as_str()), (scene.registry.host().as_str(), "team/app"));
    assert_eq!(grant.expires - grant.issued, 60);
    let (caller, blob) = (caller_of(&grant), scene.blob.digest);
    let node = scene.cluster.security(Role::Node, "m");
    let demand = Demand::of_node(&node, scene.folder.path().join("grants"));
    let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let check = |seconds, header: &HeaderValue| demand.check(at(seconds), Some(&caller), blob, Some(header));
    assert_eq!(check(grant.issued, &header), Ok(()));
    assert_eq!(check(grant.expires + 29, &header), Ok(()), "clocks differ");
    assert_eq!(check(grant.expires + 30, &header), Err(GrantError::Ended(30)));
    assert_eq!(check(grant.issued - 31, &header), Err(GrantError::Early(31)));
    // What seeders' clocks show counts instead of the own one, and it is enough that it is good by one of them.
    let told = Demand::of_node(&node, scene.folder.path().join("grants"));
    let good = |told: &Demand| told.check(at(grant.issued), Some(&caller), blob, Some(&header)).is_ok();
    told.tell_time("late", grant.expires + 1000, since_boot());
    assert!(!good(&told));
    told.tell_time("right", grant.issued + 1, since_boot());
    assert!(good(&told));

    let other = crate::security::tls::Caller { key: Digest::of(b"another key"), ..caller.clone() };
    let stolen = demand.check(at(grant.issued), Some(&other), blob, Some(&header));
    assert_eq!(stolen, Err(GrantError::OtherMachine));
    assert_eq!(demand.check(at(grant.issued), None, blob, Some(&header)), Err(GrantError::Stranger));
    assert_eq!(demand.check(at(grant.issued), Some(&caller), blob, None), Err(GrantError::None));

    // Every byte of it counts, apart from what is cut off of its base64.
    let token = of_header(&header).unwrap();
    for at in (0..token.len()).step_by(7) {
        let mut forged = token.clone();
        forged[at] ^= 1;
        let error = check(grant.issued, &to_header(&forged).unwrap()).unwrap_err();
        assert!(matches!(error, GrantError::Forged(_) | GrantError::Unreadable), "{at}: {error}");
    }
    for odd in ["", "=", "AAAA", "____________", &"A".repeat(20_000)] {
        assert_eq!(check(grant.issued, &HeaderValue::from_str(odd).unwrap()), Err(GrantError::Unreadable));
    }
    // Signed by a seeder, but of another cluster; and a statement of another kind.
    let stranger = TestCluster::new().security(Role::Seeder, "s").signer().unwrap().unwrap();
    let error = check(grant.issued, &to_header(&grant.seal(&stranger).unwrap()).unwrap()).unwrap_err();
    assert!(matches!(error, GrantError::Forged(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_down_the_policy_decides() {
    for (registry_down, is_extended) in [(Duration::ZERO, false), (Duration::from_secs(3600), true)] {
        let scene = Scene::known(98, registry_down).await;
        let (blob, seeders) = (scene.blob.digest, scene.client("n", RIGHT));
        let first = seeders.grants().renew(blob, None).await.unwrap();
        let confirmed = opened(&scene, &first).confirmed;
        let html =
            |status| Some((crate::registry::fake::Odd::Status(status, "text/plain".to_owned(), String::new()), None));
        scene.registry.set(|behaviour| behaviour.odd = html(500));
        scene.issuer.forget_answers();
        let next = seeders.grants().renew(blob, Some(&first)).await;
        match is_extended {
            true => assert_eq!(opened(&scene, &next.unwrap()).confirmed, confirmed, "the time runs on"),
            false => assert!(next.unwrap_err().contains("cannot be asked now")),
        }
        // Who had none gets none, not even with somebody else's former grant.
        assert!(scene.denial("n2", RIGHT).await.contains("cannot be asked now"));
        // A registry that says no is not down.
        scene.registry.set(|behaviour| behaviour.odd = html(403));
        scene.issuer.forget_answers();
        let error = seeders.grants().renew(blob, None).await;
        if is_extended {
            // The extended grant is still good, and asked for nothing.
            assert!(error.is_ok());
        }
        assert!(scene.denial("n3", RIGHT).await.contains("403"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn extended_grants_end() {
    const ALLOWED: u64 = 600;
    let scene = Scene::known(102, Duration::from_secs(ALLOWED)).await;
    let signer = scene.cluster.security(Role::Seeder, "s").signer().unwrap().unwrap();
    let (blob, confirmed) = (scene.blob.clone(), 1_000_000);
    let grant = Grant {
        key: Digest::of(b"key"),
        blob: blob.digest,
        registry: blob.registry.clone(),
        repository: blob.repository.clone(),
        stage: Stage::Whole,
        issued: confirmed + 500,
        expires: confirmed + 560,
        confirmed,
    };
    let extends = |grant: &Grant, blob: &BlobRef, seconds: u64| {
        let caller = caller_of(&Grant { key: Digest::of(b"key"), ..grant.clone() });
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        scene.issuer.extends(&caller, blob, &grant.seal(&signer).unwrap(), now)
    };
    assert_eq!(extends(&grant, &blob, confirmed + ALLOWED - 1), Some(confirmed), "it ended long ago, and counts");
    assert_eq!(extends(&grant, &blob, confirmed + ALLOWED), None, "from then on not even once more");
    // One that was extended says so: its time does not begin anew.
    let extended = Grant { issued: confirmed + 599, expires: confirmed + 659, ..grant.clone() };
    assert_eq!(extends(&extended, &blob, confirmed + ALLOWED), None);
    // Somebody else's, for another place, for an ingest, from the future.
    let at = confirmed + 10;
    assert_eq!(extends(&Grant { key: Digest::of(b"other"), ..grant.clone() }, &blob, at), None);
    assert_eq!(extends(&grant, &BlobRef { repository: "team/other".to_owned(), ..blob.clone() }, at), None);
    assert_eq!(extends(&Grant { stage: Stage::Ingest, ..grant.clone() }, &blob, at), None);
    assert_eq!(extends(&Grant { confirmed: at + 31, ..grant.clone() }, &blob, at), None);
    // Nor does a token of another cluster count.
    let stranger = TestCluster::new().security(Role::Seeder, "s").signer().unwrap().unwrap();
    let (caller, now) = (caller_of(&grant), SystemTime::UNIX_EPOCH + Duration::from_secs(at));
    assert_eq!(scene.issuer.extends(&caller, &blob, &grant.seal(&stranger).unwrap(), now), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_may_not_make_the_seeder_ask_without_end() {
    let scene = Scene::known(103, Duration::ZERO).await;
    let allowed = (0..10_000).take_while(|_| scene.issuer.allows(Digest::of(b"greedy"))).count();
    // What comes back meanwhile counts too.
    assert!((512..2_000).contains(&allowed), "{allowed}");
    assert!(scene.issuer.allows(Digest::of(b"other")));
}

/// Gives grants that last for `validity`, and keeps when it was asked.
struct Clockwork {
    validity: Duration,
    asked: std::sync::Arc<parking_lot::Mutex<Vec<Instant>>>,
}

impl Giver for Clockwork {
    fn ask(&self, _: Digest, request: api::AskRequest) -> BoxFuture<'_, Answer> {
        let mut asked = self.asked.lock();
        asked.push(Instant::now());
        // The former one comes along, for a registry that is down.
        assert_eq!(request.former.is_empty(), asked.len() == 1);
        let token = vec![asked.len() as u8; 16];
        let valid_ms = u32::try_from(self.validity.as_millis()).unwrap();
        Box::pin(async move { Answer::Granted(api::Grant { token, valid_ms }) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_is_used_is_renewed_before_it_ends() {
    let (validity, asked) = (Duration::from_secs(3), std::sync::Arc::new(parking_lot::Mutex::new(Vec::new())));
    let held = Held::new(Box::new(Clockwork { validity, asked: asked.clone() }));
    let blob = FakeRegistry::start().await.put_blob(Sample::one_frame(1).blob);
    held.note(&blob);
    assert_eq!(held.current(blob.digest), None);
    let first = held.renew(blob.digest, None).await.unwrap();
    let got = Instant::now();
    while asked.lock().len() < 2 {
        assert!(got.elapsed() < PATIENCE, "it is not renewed");
        // Nobody waits for it: until the next one is there the old one goes on, as long as it is good.
        let current = held.current(blob.digest);
        assert!(
            got.elapsed() > validity * 8 / 10
                || current.as_ref().is_some_and(|shown| *shown == first || asked.lock().len() > 1)
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let pauses: Vec<Duration> = asked.lock().windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses[0] >= validity * 2 / 3, "{pauses:?}");
    while held.current(blob.digest).is_none_or(|shown| shown == first) {
        assert!(got.elapsed() < PATIENCE, "the new one is not shown");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_layers_with_grants_are_bounded() {
    let (validity, asked) = (Duration::from_secs(60), std::sync::Arc::default());
    let held = Held::new(Box::new(Clockwork { validity, asked }));
    let of = |number: u32| BlobRef {
        registry: "r.test".to_owned(),
        repository: "a/b".to_owned(),
        digest: Digest::of(&number.to_le_bytes()),
        size: 0,
        media_type: String::new(),
        urls: Vec::new(),
    };
    held.note(&of(0));
    held.renew(of(0).digest, None).await.unwrap();
    (1..20_000).for_each(|number| held.note(&of(number)));
    assert!(held.layers() <= 8 << 10, "{}", held.layers());
    assert!(held.current(of(0).digest).is_some(), "one that is good stays");
}

/// Takes whatever comes.
struct Anything;

impl ChunkSink for Anything {
    fn chunk(&mut self, _: ChunkIndex, _: &[u8], _: usize) -> Result<(), WrongChunk> {
        Ok(())
    }
}

async fn fetch(source: &PeerSource, run: Range<u32>) -> Result<(), SourceError> {
    tokio::time::timeout(PATIENCE, source.fetch(run, Priority::Demand, &mut Anything)).await.expect("it ends")
}

/// Lets `node` give what it has to who shows what `demand` wants.
async fn share(node: &std::sync::Arc<Node>, demand: &Demand, security: &Security) -> (std::net::SocketAddr, DropGuard) {
    share_within(node, demand, security, swarm::UploadConfig::default()).await
}

/// The same within the bounds of `uploads`; whom it sends away it tells of 10.0.0.9.
async fn share_within(
    node: &std::sync::Arc<Node>,
    demand: &Demand,
    security: &Security,
    uploads: swarm::UploadConfig,
) -> (std::net::SocketAddr, DropGuard) {
    let other: Member = "10.0.0.9:7071".parse().unwrap();
    let holders: Holders = Box::new(move |_, _, _| {
        let others = vec![other.clone()];
        Box::pin(async move { others })
    });
    let sharing = Sharing::new(node.clone(), uploads, Refused::default(), holders);
    let router = demand.guard(serve::router(std::sync::Arc::new(sharing), 64));
    let listener = Listener::bind("127.0.0.1:0", security, Limits::default()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn(listener.serve(router, stop.clone()));
    (address, stop.drop_guard())
}

/// They read from the seeder, give to others, who show grants of the seeder's clock, and get from others.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_whose_clocks_are_an_hour_off_take_part() {
    let scene = Scene::known(104, Duration::ZERO).await;
    for (giver, taker) in [(-3600, 0), (3600, 0), (0, -3600), (0, 3600)] {
        let what = format!("one that is {giver} s ahead gives to one that is {taker} s ahead");
        let name = format!("giver{giver}{taker}");
        let security = scene.cluster.security(Role::Node, "giver").with_clock(Clock::ahead_by(giver));
        let node = scene.node(&name);
        let layer = scene.resolve_as(&security, &node, &name, RIGHT).await.unwrap();
        layer.read(0..1000).await.unwrap();
        let demand = Demand::of_node(&security, node.root().join("grants"));
        let (address, _stop) = share(&node, &demand, &security).await;
        let theirs = scene.cluster.security(Role::Node, "taker").with_clock(Clock::ahead_by(taker));
        let seeders = scene.client_of(theirs.clone(), "taker", RIGHT);
        let grants = seeders.grants().clone();
        let options = seeder::Options::default();
        let peer = PeerClient::new(address, &theirs, OwnAddress::default(), Some(grants), options).unwrap();
        let source = PeerSource::new(peer, scene.blob.digest, layer.geometry());
        let unasked = fetch(&source, 0..1).await;
        assert_eq!(unasked.is_ok(), giver == 0, "{what}: {unasked:?}");
        demand.tell_time("s", seconds(SystemTime::now()), since_boot());
        fetch(&source, 0..1).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_demand_what_seeders_tell_them_to() {
    let scene = Scene::known(99, Duration::ZERO).await;
    let node = scene.node("giver");
    let layer = scene.resolve(&node, "giver", RIGHT).await.unwrap();
    layer.read(0..1000).await.unwrap();
    let security = scene.cluster.security(Role::Node, "giver");
    let file = node.root().join("grants");
    let demand = Demand::of_node(&security, file.clone());
    assert!(demand.is_on(), "until somebody says otherwise");
    let (address, _stop) = share(&node, &demand, &security).await;

    let options = seeder::Options::default();
    let source = |client| PeerSource::new(client, scene.blob.digest, layer.geometry());
    let with_grants = |security: &Security, seeders: &seeder::Client| {
        let grants = seeders.grants().clone();
        source(PeerClient::new(address, security, OwnAddress::default(), Some(grants), options).unwrap())
    };
    let (a, b) = (scene.cluster.security(Role::Node, "a"), scene.cluster.security(Role::Node, "b"));
    let bare = {
        let security = scene.cluster.security(Role::Node, "bare");
        source(PeerClient::new(address, &security, OwnAddress::default(), None, options).unwrap())
    };
    let refused = |result: Result<(), SourceError>| match result {
        Err(SourceError::Denied { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    assert!(refused(fetch(&bare, 0..1).await).contains("grants.mode"));
    let (good, wrong) = (scene.client_of(a.clone(), "a", RIGHT), scene.client_of(b.clone(), "b", Some("wrong")));
    fetch(&with_grants(&a, &good), 0..1).await.unwrap();
    assert!(refused(fetch(&with_grants(&b, &wrong), 0..1).await).contains("no grant is to be had"));
    // A grant that somebody else holds: the certificate shows whose it is.
    assert!(refused(fetch(&with_grants(&b, &good), 0..1).await).contains("another machine"));

    demand.tell("s1", false).await;
    fetch(&bare, 0..1).await.unwrap();
    assert!(!Demand::of_node(&security, file.clone()).is_on(), "kept over a restart");
    demand.tell("s2", true).await;
    refused(fetch(&bare, 0..1).await);
    assert!(Demand::of_node(&security, file.clone()).is_on());
    demand.tell("s2", false).await;
    fetch(&bare, 0..1).await.unwrap();
    assert!(!Demand::of_node(&Security::Off, file).is_on(), "without security there is nobody to tell apart");
    node.shutdown().await;
}

/// A node that has enough to do tells who else has a chunk: only who may have it learns that.
#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_grant_learns_of_no_holder() {
    let scene = Scene::known(105, Duration::ZERO).await;
    let node = scene.node("giver");
    let layer = scene.resolve(&node, "giver", RIGHT).await.unwrap();
    layer.read(0..1000).await.unwrap();
    let security = scene.cluster.security(Role::Node, "giver");
    let demand = Demand::of_node(&security, node.root().join("grants"));
    let uploads = swarm::UploadConfig { slots: 0, demand_slots: 0, ..swarm::UploadConfig::default() };
    let (address, _stop) = share_within(&node, &demand, &security, uploads).await;
    let taker = scene.cluster.security(Role::Node, "taker");
    let source = |grants| {
        let peer = PeerClient::new(address, &taker, OwnAddress::default(), grants, seeder::Options::default()).unwrap();
        PeerSource::new(peer, scene.blob.digest, layer.geometry())
    };
    let without = fetch(&source(None), 0..1).await;
    assert!(matches!(without, Err(SourceError::Denied { .. })), "{without:?}");
    let seeders = scene.client_of(taker.clone(), "taker", RIGHT);
    match fetch(&source(Some(seeders.grants().clone())), 0..1).await {
        Err(SourceError::Busy { peers, .. }) => assert_eq!(peers, ["10.0.0.9:7071".parse().unwrap()]),
        other => panic!("{other:?}"),
    }
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_to_a_layer_is_guarded() {
    let scene = Scene::known(100, Duration::ZERO).await;
    let identity = scene.cluster.config(Role::Node, "n");
    let pem = [std::fs::read(&identity.certificate).unwrap(), std::fs::read(&identity.key).unwrap()].concat();
    let ca = reqwest::Certificate::from_pem(&std::fs::read(&identity.ca).unwrap()).unwrap();
    let http = reqwest::Client::builder()
        .identity(reqwest::Identity::from_pem(&pem).unwrap())
        .tls_certs_merge([ca])
        .no_proxy()
        .build()
        .unwrap();
    let blob = scene.blob.digest.to_string();
    let base = format!("https://{}", scene.address);
    let encoded = blob.replace(':', "%3A").replace('a', "%61");
    for blob in [&blob, &encoded] {
        for what in ["chunks/0-1", "follow", "index/header", "index/entries", "index/chunk_digests", "index/spans"] {
            let response = http.get(format!("{base}/v1/layers/{blob}/{what}")).send().await.unwrap();
            assert_eq!(response.status(), 403, "{blob} {what}");
            assert_eq!(response.headers()["drover-grant"], "wanted");
        }
    }
    let answer = |path: String| {
        let http = http.clone();
        async move { http.get(path).send().await.unwrap().status().as_u16() }
    };
    assert_eq!(answer(format!("{base}/healthz")).await, 200);
    assert_eq!(answer(format!("{base}/v1/layers/nonsense/chunks/0-1")).await, 400);
    assert_eq!(answer(format!("{base}/v1/layers/{}/chunks/0-1", blob.to_uppercase())).await, 400);
}
