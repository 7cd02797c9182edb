//! Runs of chunks in messages: first and end, one behind the other.

use std::ops::Range;

/// As they travel.
pub fn encode(runs: impl IntoIterator<Item = Range<u32>>) -> Vec<u32> {
    runs.into_iter().flat_map(|run| [run.start, run.end]).collect()
}

/// `None`: they are not ascending runs, each with something in it.
pub fn decode(numbers: &[u32]) -> Option<Vec<Range<u32>>> {
    let (pairs, []) = numbers.as_chunks::<2>() else { return None };
    let is_ascending = numbers.windows(2).enumerate().all(|(at, pair)| match pair {
        [left, right] if at % 2 == 0 => left < right,
        [left, right] => left <= right,
        _ => true,
    });
    is_ascending.then(|| pairs.iter().map(|[first, end]| *first..*end).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ascending_runs_are_taken() {
        let runs = vec![0..3, 3..4, 9..20];
        assert_eq!(decode(&encode(runs.clone())), Some(runs));
        assert_eq!(decode(&[]), Some(Vec::new()));
        for wrong in [&[1][..], &[1, 2, 3], &[2, 2], &[3, 2], &[0, 5, 4, 6], &[0, u32::MAX, 0, u32::MAX]] {
            assert_eq!(decode(wrong), None, "{wrong:?}");
        }
    }
}
