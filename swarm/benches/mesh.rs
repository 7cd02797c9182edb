//! The table of docs/BENCHMARKS.md: `make bench-swarm`.

#[path = "../tests/simulator/mod.rs"]
mod simulator;

use simulator::{Report, Scenario, simulate};

const GIB: u64 = 1 << 30;

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!(
        "| scenario | seed | last ÷ bound | median ÷ bound | seeder copies | registry copies | zone entered | most sent by a node | p50, p99 | asked twice | wrong got, passed on | complete | requests (seeder) | events |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (name, scenario) in scenarios(seed) {
        if chosen.is_empty() || chosen.iter().any(|chosen| name.contains(chosen.as_str())) {
            let bound = scenario.bound();
            let report = simulate(scenario);
            println!("{}", line(name, &report, bound.as_secs_f64()));
        }
    }
}

fn scenarios(seed: u64) -> Vec<(&'static str, Scenario)> {
    let thousand = Scenario::new(seed, 1000, GIB);
    vec![
        ("100, 1 GiB", Scenario::new(seed, 100, GIB)),
        ("1000, 1 GiB", thousand.clone()),
        ("1000, 3 zones", Scenario { zones: 3, ..thousand.clone() }),
        ("1000, seeder dies at 30 %", Scenario { seeder_dies_at: Some(30), ..thousand.clone() }),
        ("1000, 20 % lie", Scenario { liars: 51, ..thousand.clone() }),
        ("1000, cold start", Scenario { demand: Some(20 << 20), ingest: false, ..thousand.clone() }),
        ("1000, runs, 10 GiB", Scenario::new(seed, 1000, 10 * GIB).with_runs_of(22)),
        ("1000, chunks, 10 GiB", Scenario::new(seed, 1000, 10 * GIB)),
        ("10000, runs, 10 GiB", Scenario::new(seed, 10_000, 10 * GIB).with_runs_of(22)),
    ]
}

fn line(name: &str, report: &Report, bound: f64) -> String {
    format!(
        "| {name} | {} | {:.3} | {:.3} | {:.3} | {:.3} | {:.3} | {:.2} | {:.0} ms, {:.0} ms | {:.2} % + {:.2} % | {}, {} | {} of {} | {} ({}) | {} M |",
        report.seed,
        report.last.as_secs_f64() / bound,
        report.median.as_secs_f64() / bound,
        report.seeder_copies,
        report.registry_copies,
        report.zone_entries,
        report.node_copies,
        report.p50.as_secs_f64() * 1e3,
        report.p99.as_secs_f64() * 1e3,
        report.hedged * 100.0,
        report.duplicates * 100.0,
        report.wrong_got,
        report.wrong_passed_on,
        report.complete,
        report.nodes,
        report.requests,
        report.seeder_requests,
        report.events / 1_000_000,
    )
}
