//! The page of a run: what is on it, that hostile text stays text, and that a real browser shows it.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use arete_scoring::{ReportInputs, RunFiles, doctor, report};
use common::{HOSTILE, N_TEST, SyntheticRun};

fn inputs(run: &Path) -> ReportInputs {
    ReportInputs { run: run.to_owned(), recipe: None, max_samples: 0, output: run.join("report") }
}

/// A run and its page; kept where `ARETE_KEEP_REPORT` says, for looking at it.
fn page_of_a_run() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("demo");
    SyntheticRun::write(&run);
    let recipe = dir.path().join("demo.toml");
    fs_err::write(&recipe, "[scoring]\nmax_new_tokens = 40 # </pre><script>\n").unwrap();
    let page = report(&ReportInputs { recipe: Some(recipe), ..inputs(&run) }).unwrap();
    if let Some(kept) = std::env::var_os("ARETE_KEEP_REPORT") {
        fs_err::create_dir_all(&kept).unwrap();
        fs_err::copy(&page, Path::new(&kept).join("report.html")).unwrap();
    }
    (dir, page)
}

#[test]
fn the_page_holds_every_section_and_no_hostile_markup() {
    let (_dir, page) = page_of_a_run();
    let html = fs_err::read_to_string(&page).unwrap();
    assert!(!html.contains("<img") && !html.contains("onerror=\"") && !html.contains(HOSTILE));
    assert_eq!(html.matches("<script>").count(), 1);
    assert_eq!(html.matches("</script>").count(), 1);
    assert!(html.contains("&lt;script&gt;document.title"));
    // Nothing is fetched: no address but namespaces of drawings, no sources, no links out.
    let addresses: Vec<&str> = html
        .match_indices("http:")
        .chain(html.match_indices("https:"))
        .map(|(at, _)| &html[at..at + 26])
        .collect();
    assert!(
        addresses.iter().all(|address| *address == "http://www.w3.org/2000/svg"),
        "{addresses:?}"
    );
    for fetched in ["<link", "<img", "<iframe", "<object", "<script src", "@import", "url("] {
        assert!(!html.contains(fetched), "{fetched}");
    }
    for id in ["score", "replies", "ppo", "reward", "judge", "data", "provenance"] {
        assert!(html.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    assert_eq!(html.matches("class=\"sample\"").count(), N_TEST);
    assert!(!html.contains("NaN") && !html.contains("not run."));
    assert!(
        html.contains("that of iteration 25.") && html.contains("moved by +0.550 [+0.310, +0.800]")
    );
    let charts = page.parent().unwrap().join("charts");
    let names: Vec<String> = fs_err::read_dir(charts)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in [
        "ppo-policy-loss",
        "ppo-reward",
        "ppo-kl",
        "ppo-length",
        "ppo-truncation",
        "ppo-probe",
        "ppo-reward-models",
        "reward-accuracy",
        "score",
    ] {
        assert!(names.contains(&format!("{name}.svg")), "{name} in {names:?}");
        assert!(html.contains(&format!("id=\"chart-{name}\"")), "{name}");
    }
}

#[test]
fn the_page_is_the_same_again_and_only_made_when_something_changed() {
    let (dir, page) = page_of_a_run();
    let run = dir.path().join("demo");
    let recipe = Some(dir.path().join("demo.toml"));
    let first = fs_err::read(&page).unwrap();
    let again = ReportInputs { recipe: recipe.clone(), ..inputs(&run) };
    let before = fs_err::metadata(&page).unwrap().modified().unwrap();
    report(&again).unwrap();
    assert_eq!(fs_err::metadata(&page).unwrap().modified().unwrap(), before);
    let elsewhere = ReportInputs { output: dir.path().join("other"), ..again };
    report(&elsewhere).unwrap();
    assert_eq!(fs_err::read(dir.path().join("other/report.html")).unwrap(), first);
    let fewer = ReportInputs { max_samples: 3, recipe, ..inputs(&run) };
    report(&fewer).unwrap();
    let html = fs_err::read_to_string(&page).unwrap();
    assert_eq!(html.matches("class=\"sample\"").count(), 3);
    assert!(html.contains(&format!("The first 3 of {N_TEST} prompts are shown.")));
}

#[test]
fn stages_that_were_not_run_are_said_to_be_so() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("half");
    SyntheticRun { dir: &run }.data();
    let page = report(&inputs(&run)).unwrap();
    let html = fs_err::read_to_string(&page).unwrap();
    for text in [
        "Scoring was not run.",
        "PPO was not run.",
        "Reward modelling was not run.",
        "have not been scored yet",
    ] {
        assert!(html.contains(text), "{text}");
    }
    assert!(html.contains("Votes by virtue"));
    // A path that is no run leaves nothing behind.
    let nowhere = inputs(&dir.path().join("nowhere"));
    assert!(report(&nowhere).unwrap_err().to_string().contains("expected the directory of a run"));
    assert!(!nowhere.output.exists());
}

#[test]
fn a_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("demo");
    SyntheticRun::write(&run);
    let path = run.join("scoring/scores.parquet");
    let bytes = fs_err::read(&path).unwrap();
    fs_err::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(report(&inputs(&run)).unwrap_err().to_string().contains("scores.parquet"));
}

#[test]
fn the_doctor_reads_the_run_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("demo");
    SyntheticRun::write(&run);
    let findings = doctor::diagnose(&RunFiles::read(&run).unwrap());
    let steps: Vec<&str> = findings.iter().map(|finding| finding.step.as_str()).collect();
    assert_eq!(
        steps,
        [
            "replies cut off",
            "judge, both orders",
            "reward models",
            "best of 16",
            "KL at the end",
            "Score"
        ]
    );
    let text = doctor::text(&findings);
    assert!(text.contains("nats a conversation") && text.contains("final − sft"), "{text}");
    // Without the measurement, the rollouts' four conversations a prompt serve.
    fs_err::remove_dir_all(run.join("best-of")).unwrap();
    let findings = doctor::diagnose(&RunFiles::read(&run).unwrap());
    assert_eq!(findings[3].step, "best of 4");
    assert!(findings[3].found.contains("4 prompts of the first rollout"), "{:?}", findings[3]);
}

/// A browser's view of the page.
struct Browser {
    program: PathBuf,
    profile: tempfile::TempDir,
}

impl Browser {
    fn find() -> Option<Self> {
        let program = ["chromium", "chromium-browser", "google-chrome"].iter().find_map(|name| {
            std::env::split_paths(&std::env::var_os("PATH")?)
                .map(|dir| dir.join(name))
                .find(|path| path.is_file())
        });
        if program.is_none() {
            println!("skipped: no Chromium on this machine");
        }
        Some(Self { program: program?, profile: tempfile::tempdir().unwrap() })
    }

    /// The page's elements after its script has run, and what the browser logged.
    fn dom(&self, page: &Path, fragment: &str) -> (String, String) {
        let output = Command::new(&self.program)
            .args([
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
            ])
            .args([
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ])
            .args(["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom"])
            .arg(format!("--user-data-dir={}", self.profile.path().display()))
            .arg(format!("file://{}{fragment}", page.display()))
            .output()
            .expect("Chromium starts");
        assert!(output.status.success(), "{output:?}");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr))
    }
}

/// Prompts' places in the order shown, those that are hidden left out.
fn shown(dom: &str) -> Vec<usize> {
    dom.split("<article ")
        .skip(1)
        .filter_map(|rest| {
            let tag = &rest[..rest.find('>')?];
            let at = tag.split_once("data-at=\"")?.1.split_once('"')?.0.parse().ok()?;
            (!tag.contains("hidden")).then_some(at)
        })
        .collect()
}

#[test]
fn a_real_browser_shows_draws_filters_and_sorts() {
    let Some(browser) = Browser::find() else { return };
    let (_dir, page) = page_of_a_run();
    let (dom, log) = browser.dom(&page, "");
    assert!(!log.contains("CONSOLE"), "{log}");
    assert!(dom.contains("<title>demo · Arete</title>"), "the hostile reply ran");
    assert_eq!(shown(&dom), (0..N_TEST).collect::<Vec<_>>());
    assert!(dom.contains(&format!("{N_TEST} of {N_TEST} prompts")));
    let figures: Vec<&str> = dom.split("<figure ").skip(1).collect();
    assert!(figures.len() >= 15, "{}", figures.len());
    for figure in figures {
        let figure = &figure[..figure.find("</figure>").unwrap()];
        let drawn = figure.matches("<polyline").count() + figure.matches("<circle").count();
        assert!(drawn > 0 && figure.matches("<text").count() > 2, "{figure}");
    }

    let differences: Vec<f64> = dom
        .split("data-diff=\"")
        .skip(1)
        .map(|rest| rest.split([' ', '"']).next().unwrap().parse().unwrap())
        .collect();
    let (dom, log) = browser.dom(&page, "#show=worse&sort=loss");
    assert!(!log.contains("CONSOLE"), "{log}");
    let mut expected: Vec<usize> = (0..N_TEST).filter(|&at| differences[at] < 0.0).collect();
    expected.sort_by(|&a, &b| differences[a].total_cmp(&differences[b]));
    assert!(!expected.is_empty() && expected.len() < N_TEST);
    assert_eq!(shown(&dom), expected);

    // Two words, in any order and case, in question or replies; final − sft: the same replies, the same scores.
    let (dom, _) = browser.dom(&page, "#q=WALLET+%28case+10%29");
    assert_eq!(shown(&dom), [10]);
    let (dom, _) = browser.dom(&page, "#pair=1&show=same");
    assert_eq!(shown(&dom), [0, 9, 18]);
    let (dom, _) = browser.dom(&page, "#q=nobodysaysthis");
    assert!(shown(&dom).is_empty() && dom.contains("0 of 24 prompts"));
}
