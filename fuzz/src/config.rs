//! The snapshotter's configuration file. What the seeder's has besides plain numbers is read by the same code.

use snapshotter::config::Config;

/// Input: the text of the file. What is taken can be worked with.
pub fn config(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(config) = Config::parse(text) else { return };
    assert!(config.root.is_absolute() && config.run.is_absolute() && config.socket().is_absolute());
    assert!(config.devices().starts_with(&config.root));
    assert!((1..=110).contains(&config.read.deadline.as_secs()));
}
