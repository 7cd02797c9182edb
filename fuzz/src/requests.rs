//! Requests of the kernel.

use snapshotter::fuse::decode::DecodeError;
use snapshotter::fuse::{Operation, decode};

/// Input: a message from `/dev/fuse`. As it is, and with the length that it has, it is a request or it is refused in a way
/// that can be answered.
pub fn fuse(input: &[u8]) {
    message(input);
    let mut corrected = input.to_vec();
    if let Some(len) = corrected.first_chunk_mut() {
        *len = (input.len() as u32).to_ne_bytes();
    }
    message(&corrected);
}

fn message(bytes: &[u8]) {
    match decode(bytes) {
        Ok(request) => {
            if let Operation::Lookup { name } = request.operation {
                let name = name.as_encoded_bytes();
                assert!(!name.is_empty() && !name.contains(&b'/') && !name.contains(&0));
            }
        }
        // Only without a header there is nothing to answer to.
        Err(error) => assert_eq!(error.unique().is_none(), matches!(error, DecodeError::NoHeader(_))),
    }
}
