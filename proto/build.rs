//! Generates the gRPC code with protox, so that no `protoc` is needed.

use std::path::Path;

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(
        [
            "containerd/snapshots.proto",
            "containerd/content.proto",
            "containerd/images.proto",
            "containerd/leases.proto",
            "containerd/diff.proto",
            "containerd/version.proto",
            "containerd/introspection.proto",
            "drover/control.proto",
            "drover/enrol.proto",
            "drover/grant.proto",
            "drover/mesh.proto",
            "drover/node.proto",
            "drover/seeder.proto",
        ],
        ["proto"],
    )?;
    // What `src/pinned.rs` compares.
    let descriptors = Path::new(&std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(descriptors, files.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
