//! What the user sees of a pull: bars on a terminal, lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shows a pull on standard error.
#[derive(Debug)]
pub struct Progress {
    is_terminal: bool,
}

/// One layer that is on its way.
#[derive(Debug)]
pub struct LayerProgress {
    bar: Option<ProgressBar>,
    title: String,
}

impl Progress {
    /// Bars where standard error is a terminal, lines elsewhere.
    pub fn new() -> Self {
        Self { is_terminal: std::io::stderr().is_terminal() }
    }

    /// One line.
    pub fn note(&self, text: &str) {
        // Nobody may be reading; the pull goes on.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// Begins the layer `number` of `count`.
    pub fn layer(&self, number: usize, count: usize, blob: &str) -> LayerProgress {
        let short = blob.get(..19).unwrap_or(blob);
        self.part(format!("layer {number}/{count} {short}"), "waiting for its index")
    }

    /// Begins to wait for all of the image.
    pub fn whole(&self) -> LayerProgress {
        self.part("the whole image".to_owned(), "asking for it")
    }

    fn part(&self, title: String, begins: &'static str) -> LayerProgress {
        let bar = self.is_terminal.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix}: {msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.set_prefix(title.clone());
            bar.set_message(begins);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        LayerProgress { bar, title }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl LayerProgress {
    /// The blob is fetched: `total` bytes.
    pub fn fetching(&self, total: u64) {
        let Some(bar) = &self.bar else {
            let _ = writeln!(std::io::stderr(), "{}: not lazy, fetching {total} bytes", self.title);
            return;
        };
        bar.set_length(total);
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {prefix}: fetching {bytes}/{total_bytes} {bytes_per_sec}")
        {
            bar.set_style(style);
        }
    }

    /// So many bytes of `total` are here.
    pub fn here(&self, bytes: u64, total: u64) {
        if self.bar.as_ref().is_some_and(|bar| bar.length() != Some(total)) {
            self.fetching(total);
        }
        self.fetched(bytes);
    }

    /// So many bytes of it are here.
    pub fn fetched(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    /// The layer is there.
    pub fn done(self, how: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let _ = writeln!(std::io::stderr(), "{}: {how}", self.title);
    }
}
