//! The seeder.

fn main() {}
