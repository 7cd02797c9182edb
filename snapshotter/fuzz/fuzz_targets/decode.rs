//! Any bytes are decoded as a FUSE request or refused.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = snapshotter::fuse::decode(bytes);
});
