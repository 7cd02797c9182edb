#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| layer_fuzz::erofs(input));
