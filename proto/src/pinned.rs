//! What machines of other versions send and expect stays as it is: `pinned.txt` lists every field, and a message of each sort is kept
//! in its encoded form.

use std::collections::BTreeSet;
use std::fmt::Debug;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

use crate::drover::{control, enrol, grant, mesh};

/// Every field, value and method that a version had. Lines are added, together with what they say, and never changed or removed.
const PINNED: &str = include_str!("pinned.txt");

/// The packages that machines speak with each other. What a machine's own programs ask it for its status is of one release.
const BETWEEN_MACHINES: [&str; 4] = ["drover.control.v1", "drover.enrol.v1", "drover.grant.v1", "drover.mesh.v1"];

#[test]
fn nothing_that_was_sent_once_changes() {
    let files = FileDescriptorSet::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"))[..]).unwrap();
    let mut lines = Vec::new();
    for file in files.file.iter().filter(|file| BETWEEN_MACHINES.contains(&file.package())) {
        let package = file.package();
        file.message_type.iter().for_each(|message| list_message(package, message, &mut lines));
        file.enum_type.iter().for_each(|values| list_enum(package, values, &mut lines));
        for service in &file.service {
            for method in &service.method {
                let stream = |is_stream| if is_stream { "stream " } else { "" };
                lines.push(format!(
                    "{package}.{}.{}: {}{} -> {}{}",
                    service.name(),
                    method.name(),
                    stream(method.client_streaming()),
                    method.input_type(),
                    stream(method.server_streaming()),
                    method.output_type()
                ));
            }
        }
    }
    let pinned: BTreeSet<&str> = PINNED.lines().collect();
    let there: BTreeSet<&str> = lines.iter().map(String::as_str).collect();
    let gone: Vec<_> = pinned.difference(&there).collect();
    assert!(gone.is_empty(), "machines of other versions say or want this: {gone:#?}");
    let new: Vec<_> = there.difference(&pinned).copied().collect();
    assert!(new.is_empty(), "not in pinned.txt, from where it never goes again:\n{}", new.join("\n"));
}

fn list_message(scope: &str, message: &DescriptorProto, lines: &mut Vec<String>) {
    let scope = format!("{scope}.{}", message.name());
    for field in &message.field {
        let choice = field.oneof_index.filter(|_| !field.proto3_optional());
        let choice = choice.and_then(|index| message.oneof_decl.get(index as usize));
        let choice = choice.map_or(String::new(), |choice| format!(" of {}", choice.name()));
        let label = match (field.label(), field.proto3_optional()) {
            (Label::Repeated, _) => "repeated ",
            (_, true) => "optional ",
            _ => "",
        };
        lines.push(format!("{scope} {}: {label}{} {}{choice}", field.number(), type_of(field), field.name()));
    }
    message.nested_type.iter().for_each(|nested| list_message(&scope, nested, lines));
    message.enum_type.iter().for_each(|values| list_enum(&scope, values, lines));
}

fn list_enum(scope: &str, values: &EnumDescriptorProto, lines: &mut Vec<String>) {
    lines.extend(
        values.value.iter().map(|value| format!("{scope}.{} {}: {}", values.name(), value.number(), value.name())),
    );
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().to_owned(),
        plain => plain.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

/// Each message encodes to these bytes and these to it, also with a field behind them that only a later version knows.
#[test]
fn messages_are_encoded_as_ever() {
    use mesh::v1::{from_seeder, to_neighbour, to_seeder};
    let blob = || vec![0xab; 4];
    let hello = || mesh::v1::Hello { address: "10.0.0.1:7071".into(), zone: "eu".into(), leech: true };
    let peer = || mesh::v1::Peer { address: "10.0.0.2:7071".into(), zone: "us".into() };
    let haves = || mesh::v1::Haves { blob: blob(), runs: vec![0, 2, 300, 301], fills: Some(false) };
    let mut kept = KEPT.lines();
    let mut check = Check(&mut kept);
    for message in [
        to_seeder::Message::Hello(hello()),
        to_seeder::Message::Join(haves()),
        to_seeder::Message::Report(haves()),
        to_seeder::Message::Leave(blob()),
        to_seeder::Message::Accuse("10.0.0.3:7071".into()),
        to_seeder::Message::Ping(mesh::v1::Ping {}),
    ] {
        check.one(mesh::v1::ToSeeder { message: Some(message) });
    }
    for message in [
        from_seeder::Message::Welcome(mesh::v1::Welcome {
            address: "10.0.0.1:7071".into(),
            grants: true,
            time: 1 << 33,
        }),
        from_seeder::Message::Introduce(mesh::v1::Introduce { blob: blob(), peer: Some(peer()) }),
        from_seeder::Message::Assign(mesh::v1::Assign { blob: blob(), first: 7, end: 9, from: Some(peer()) }),
        from_seeder::Message::Expel("10.0.0.3:7071".into()),
        from_seeder::Message::Unknown(blob()),
        from_seeder::Message::Known(blob()),
        from_seeder::Message::Pong(mesh::v1::Pong {}),
    ] {
        check.one(mesh::v1::FromSeeder { message: Some(message) });
    }
    let delegates = vec![mesh::v1::Delegate { id: 0x0102_0304_0506_0708, zone: 0x0a0b_0c0d, beat: 5 }];
    for message in [
        to_neighbour::Message::Hello(hello()),
        to_neighbour::Message::Haves(mesh::v1::LayerHaves { haves: Some(haves()), delegates, coming: vec![8, 16] }),
    ] {
        check.one(mesh::v1::ToNeighbour { message: Some(message) });
    }
    check.one(mesh::v1::Told {});
    check.one(control::v1::ResolveRequest {
        blob: "sha256:00".into(),
        blob_size: 1 << 40,
        media_type: "m".into(),
        registry: "r:5000".into(),
        repository: "a/b".into(),
        urls: vec!["https://u".into()],
        wants_digests: true,
    });
    use control::v1::resolve_event::Event;
    for event in [
        Event::Progress(control::v1::Progress {
            blob_read: 1,
            blob_size: 2,
            device_read: 3,
            ahead_read: 4,
            first_digest: 5,
            digests: blob(),
        }),
        Event::Ready(control::v1::Ready { header: blob(), signature: blob(), certificates: vec![blob()] }),
        Event::Unsupported(control::v1::Unsupported { reason: "why".into() }),
    ] {
        check.one(control::v1::ResolveEvent { event: Some(event) });
    }
    use grant::v1::credential::Secret;
    let credential = |secret| grant::v1::Credential { host: "r".into(), secret: Some(secret) };
    check.one(grant::v1::AskRequest {
        blob: "sha256:00".into(),
        registry: "r:5000".into(),
        repository: "a/b".into(),
        credentials: vec![
            credential(Secret::Password(grant::v1::Password { user: "u".into(), password: "p".into() })),
            credential(Secret::IdentityToken("i".into())),
            credential(Secret::RegistryToken("t".into())),
        ],
        former: blob(),
    });
    check.one(grant::v1::Grant { token: blob(), valid_ms: 60_000 });
    check.one(enrol::v1::EnrolRequest { token: "t".into(), certificate_request: blob(), name: "n".into() });
    check.one(enrol::v1::RenewRequest { certificate_request: blob() });
    check.one(enrol::v1::Certificate { chain: vec![blob()], authorities: vec![blob()] });
    assert_eq!(kept.next(), None);
}

/// The encoded messages, in the order of the test.
const KEPT: &str = include_str!("pinned.hex");

struct Check<'a, 'b>(&'a mut std::str::Lines<'b>);

impl Check<'_, '_> {
    fn one<M: Message + Default + PartialEq + Debug>(&mut self, message: M) {
        let hex: String = message.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect();
        let kept = self.0.next().unwrap_or_default();
        assert_eq!(hex, kept, "{message:?}");
        let mut bytes = message.encode_to_vec();
        assert_eq!(M::decode(&bytes[..]).unwrap(), message);
        // Field 1000, three bytes.
        bytes.extend([0xc2, 0x3e, 3, 1, 2, 3]);
        assert_eq!(M::decode(&bytes[..]).unwrap(), message, "a field of a later version");
    }
}
