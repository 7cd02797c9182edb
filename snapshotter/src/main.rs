//! The snapshotter daemon and its keeper.

fn main() {}
