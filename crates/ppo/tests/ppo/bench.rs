//! The bench program prints a figure for every phase of every case.

use std::process::Command;

use crate::common::tiny_chat;

#[test]
fn every_phase_has_a_figure_and_a_ceiling() {
    let out = Command::new(env!("CARGO_BIN_EXE_arete-ppo"))
        .args(["bench", "--model"])
        .arg(tiny_chat())
        .args([
            "--prompts",
            "9",
            "--prompt-tokens",
            "30",
            "--new-tokens",
            "5",
            "--chain-tokens",
            "3",
        ])
        .args(["--cases", "trunk,adapter,chain", "--device", "cpu", "--threads", "1"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| "))
        .skip(1)
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), 3 * 6, "{text}");
    for case in rows.chunks(6) {
        assert!(case[0][1].starts_with("PPO iteration: "), "{text}");
        for (row, phase) in
            case[1..].iter().zip(["sampling", "scoring", "reference", "first pass", "update"])
        {
            assert_eq!(row[1], format!("– {phase}, tokens/s"));
            assert!(row[2].parse::<f64>().unwrap() > 0.0 && row[3].parse::<f64>().unwrap() > 0.0);
        }
    }
    // Replies are as long as they may be, since no token ends them: 5, and 3 of each turn.
    assert!(rows[0][5].starts_with("9 conversations, 5 own of "), "{text}");
    assert!(rows[12][5].starts_with("9 conversations, 9 own of "), "{text}");
    assert!(text.contains("peak memory"), "{text}");
}
