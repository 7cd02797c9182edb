//! What the benchmarks print: tables of medians.

use std::fs;

use anyhow::{Context, Result};

use crate::tools::target;

/// The middle value, or the mean of the two middle ones; NaN of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    match (values.get(values.len() / 2), values.get(values.len().saturating_sub(1) / 2)) {
        (Some(a), Some(b)) => f64::midpoint(*a, *b),
        _ => f64::NAN,
    }
}

/// The least and the greatest value.
pub fn spread(values: impl IntoIterator<Item = f64>) -> (f64, f64) {
    values.into_iter().fold((f64::MAX, f64::MIN), |(least, most), value| (least.min(value), most.max(value)))
}

/// Kernel and processors of this machine, for the line above a table.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, usize::from);
    format!("Linux {}, {processors} processors", kernel.trim())
}

/// Prints a report and writes it to `NAME.md` in the target folder.
pub fn publish(name: &str, text: &str) -> Result<()> {
    println!("{text}");
    let path = target()?.join(format!("{name}.md"));
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("written to {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0]), 2.5);
        assert!(median([]).is_nan());
        assert_eq!(spread([2.0, 1.0, 3.0]), (1.0, 3.0));
    }
}
