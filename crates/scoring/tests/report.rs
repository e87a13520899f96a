//! The page of a run: what is on it, that hostile text stays text, and that a real browser shows it.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test says what it measured")]

#[path = "common/browser.rs"]
mod browser;
mod common;

use std::path::{Path, PathBuf};

use arete_records::stats::Interval;
use arete_scoring::report::{Chart, Colour, Estimate, Series, Unit};
use arete_scoring::{ReportInputs, RunFiles, doctor, report};
use browser::Browser;
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

/// A recipe may name servers by addresses with a password; the page travels.
#[test]
fn no_secret_of_an_address_reaches_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("demo");
    SyntheticRun::write(&run);
    let recipe = dir.path().join("demo.toml");
    let text =
        "[run]\nengine_url = \"http://bob:hunter2&x@10.0.0.1:80/v1\" # and https://key-0815@host\n";
    fs_err::write(&recipe, text).unwrap();
    let page = report(&ReportInputs { recipe: Some(recipe), ..inputs(&run) }).unwrap();
    let html = fs_err::read_to_string(&page).unwrap();
    for secret in ["hunter2", "bob", "key-0815"] {
        assert!(!html.contains(secret), "{secret}");
    }
    assert!(html.contains("***@10.0.0.1:80"));
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
    for id in ["score", "diagnosis", "replies", "ppo", "reward", "judge", "data", "provenance"] {
        assert!(html.contains(&format!("<section id=\"{id}\">")), "{id}");
    }
    assert_eq!(html.matches("class=\"sample\"").count(), N_TEST);
    assert!(!html.contains("NaN") && !html.contains("not run."));
    assert!(html.contains("pairwise-logits, 2-shot") && html.contains("61.0 % [51.0, 70.0]"));
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
        "ppo-kl-score",
        "reward-accuracy",
        "reward-calibration",
        "judge-votes",
        "judge-first-shown",
        "score",
    ] {
        assert!(names.contains(&format!("{name}.svg")), "{name} in {names:?}");
        assert!(html.contains(&format!("id=\"chart-{name}\"")), "{name}");
    }
}

/// The page but for the element that says when and where it was made.
fn without_made(html: &str) -> String {
    let (before, rest) = html.split_once("<aside id=\"made\"").unwrap();
    let (_, after) = rest.split_once("</aside>").unwrap();
    assert!(!after.contains("<aside"));
    before.to_owned() + after
}

#[test]
fn the_page_says_when_and_where_it_was_made_in_one_place() {
    let (_dir, page) = page_of_a_run();
    let html = fs_err::read_to_string(&page).unwrap();
    let (_, made) = html.split_once("<aside id=\"made\"").unwrap();
    let (made, _) = made.split_once("</aside>").unwrap();
    assert!(made.contains(" UTC</span>"), "{made}");
    assert!(made.contains("EPYC of a test · 2 cores") && made.contains("took 63 s"), "{made}");
    assert!(!without_made(&html).contains("EPYC of a test"));
}

#[test]
fn pairs_labelled_by_construction_have_no_votes() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("half");
    SyntheticRun { dir: &run }.data();
    // As an older version left them: a vote of every virtue for pairs that nobody judged.
    SyntheticRun { dir: &run }.label_by_construction();
    let html = fs_err::read_to_string(report(&inputs(&run)).unwrap()).unwrap();
    assert!(html.contains("No judge was asked, and nobody voted"), "no word of it");
    assert!(!html.contains("Votes by virtue") && !html.contains("chart-judge-votes"));
    let findings = doctor::diagnose(&RunFiles::read(&run).unwrap());
    assert_eq!(findings[1].grade, doctor::Grade::Unknown, "{:?}", findings[1]);
}

#[test]
fn the_page_is_the_same_again_and_only_made_when_something_changed() {
    let (dir, page) = page_of_a_run();
    let run = dir.path().join("demo");
    let recipe = Some(dir.path().join("demo.toml"));
    let first = without_made(&fs_err::read_to_string(&page).unwrap());
    let again = ReportInputs { recipe: recipe.clone(), ..inputs(&run) };
    let before = fs_err::metadata(&page).unwrap().modified().unwrap();
    report(&again).unwrap();
    assert_eq!(fs_err::metadata(&page).unwrap().modified().unwrap(), before);
    let elsewhere = ReportInputs { output: dir.path().join("other"), ..again };
    report(&elsewhere).unwrap();
    let other = fs_err::read_to_string(dir.path().join("other/report.html")).unwrap();
    assert_eq!(without_made(&other), first);
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
            "PPO's beginning",
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

/// Prompts' places in the order shown, those that are hidden left out.
fn shown(browser: &mut Browser) -> Vec<usize> {
    let places = browser.evaluate(
        "[...document.querySelectorAll('.sample')].filter(e => !e.hidden).map(e => Number(e.dataset.at))",
    );
    serde_json::from_value(places).unwrap()
}

#[test]
fn a_real_browser_shows_draws_filters_and_sorts() {
    let Some(mut browser) = Browser::start() else { return };
    let (_dir, page) = page_of_a_run();
    browser.open(&page);
    assert_eq!(browser.evaluate("document.title"), "demo · Arete", "the hostile reply ran");
    let drawn = "[...document.querySelectorAll('figure')].map(f => \
                 [f.id, f.querySelectorAll('polyline, circle, rect').length, f.querySelectorAll('text').length, \
                  f.querySelector('svg').getBoundingClientRect().height])";
    let figures: Vec<(String, usize, usize, f64)> =
        serde_json::from_value(browser.evaluate(drawn)).unwrap();
    assert!(figures.len() >= 18, "{}", figures.len());
    for (id, n_marks, n_texts, height) in figures {
        assert!(n_marks > 0 && n_texts > 2 && height > 100.0, "{id} {n_marks} {n_texts} {height}");
    }

    let every: Vec<usize> = (0..N_TEST).collect();
    assert_eq!(shown(&mut browser), every);
    let counted = "document.getElementById('count').textContent";
    assert_eq!(browser.evaluate(counted), format!("{N_TEST} of {N_TEST} prompts"));
    let differences: Vec<f64> = serde_json::from_value(browser.evaluate(
        "[...document.querySelectorAll('.sample')].map(e => Number(e.dataset.diff.split(' ')[0]))",
    ))
    .unwrap();
    browser.choose("#show", "worse");
    browser.choose("#sort", "loss");
    let mut expected: Vec<usize> =
        every.iter().copied().filter(|&at| differences[at] < 0.0).collect();
    expected.sort_by(|&a, &b| differences[a].total_cmp(&differences[b]));
    assert!(!expected.is_empty() && expected.len() < N_TEST);
    assert_eq!(shown(&mut browser), expected);
    // The choice is in the address, so that it survives a reload and can be sent to somebody.
    assert_eq!(browser.evaluate("location.hash"), "#show=worse&sort=loss");
    browser.choose("#show", "all");
    browser.choose("#sort", "file");

    // Two words, in any order and case, in question or replies.
    browser.click("#q");
    browser.type_text("WALLET (case 10)");
    assert_eq!(shown(&mut browser), [10]);
    browser.type_text(" nobodysaysthis");
    assert!(shown(&mut browser).is_empty());
    assert_eq!(browser.evaluate("document.getElementById('none').hidden"), false);
    browser.evaluate("document.getElementById('q').value = ''");
    // The names of turns stand on every card and are not searched.
    browser.click("#q");
    browser.type_text("consequence");
    assert!(shown(&mut browser).is_empty());
    browser.evaluate("document.getElementById('q').value = ''");
    // final − sft: the same replies, the same scores.
    browser.choose("#pair", "1");
    browser.choose("#show", "same");
    assert_eq!(shown(&mut browser), [0, 9, 18]);
    browser.choose("#show", "all");

    let n_open = "document.querySelectorAll('.turn[open]').length";
    assert_eq!(browser.number(n_open) as usize, N_TEST);
    browser.click("#open");
    assert_eq!(browser.number(n_open) as usize, 3 * N_TEST);
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// Texts that leave their drawing, and pairs of texts of one drawing that lie over each other.
const CLIPPED: &str = "[...document.querySelectorAll('svg')].flatMap(svg => {
    const own = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
    const outside = texts.filter(([, t]) => t.left < own.left - 0.5 || t.right > own.right + 0.5
        || t.top < own.top - 0.5 || t.bottom > own.bottom + 0.5).map(([text]) => text);
    const over = texts.flatMap(([text, a], at) => texts.slice(at + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
        .map(([other]) => text + ' over ' + other));
    return [...outside, ...over];
})";

#[test]
fn no_name_in_a_chart_is_clipped() {
    let Some(mut browser) = Browser::start() else { return };
    let (dir, page) = page_of_a_run();
    browser.open(&page);
    let nothing: [&str; 0] = [];
    assert_eq!(browser.evaluate(CLIPPED), serde_json::json!(nothing));
    // Many models, with the widest letters there are.
    let wide = "W".repeat(60);
    for names in [
        vec!["action", "motivation", "consequence", "perfect"],
        vec!["lr-1e-4", "lr-3e-5", "lr-1e-5", "lr-3e-6", "lr-1e-6", "lr-3e-7", "lr-1e-7"],
        vec!["recommended-seed-1", "MMMMMMMMMMMM", &wide, "重み付き報酬モデル", "ﷺ", "b"],
        (0..24).map(|_| "recommended-lr-1e-5-no-warm-up-seed-1").collect(),
    ] {
        let colour = Colour(1);
        let interval = Interval { estimate: 0.5, low: 0.4, high: 0.6 };
        let series: Vec<Series> =
            names.iter().map(|name| Series::new(*name, colour, vec![(1.0, 2.0)])).collect();
        let estimates: Vec<Estimate> = names
            .iter()
            .map(|name| Estimate { name: (*name).to_owned(), colour, interval, reference: None })
            .collect();
        let charts = [
            Chart::lines("x", "t", "c", "step", Unit::Number, &series).unwrap().unwrap(),
            Chart::estimates("x", "t", "c", Unit::Share, &estimates, None).unwrap().unwrap(),
        ];
        for chart in charts {
            let path = dir.path().join("chart.html");
            let font = "sans-serif; width: 360px";
            let html = format!("<body style='font-family: {font}'>{}", chart.inline());
            fs_err::write(&path, html).unwrap();
            browser.open(&path);
            assert_eq!(browser.evaluate(CLIPPED), serde_json::json!(nothing), "{names:?}");
            let n_texts = browser.number("document.querySelectorAll('svg text').length");
            assert!(n_texts as usize > names.len());
        }
    }
}

#[test]
fn a_reader_who_points_at_a_curve_is_told_its_value() {
    let Some(mut browser) = Browser::start() else { return };
    let (_dir, page) = page_of_a_run();
    browser.look(1200, 900, false);
    browser.open(&page);
    let pointed_at = browser.evaluate(
        "(() => { const tip = document.querySelector('#chart-ppo-clip .tip:last-of-type'); \
         tip.scrollIntoView({block: 'center', behavior: 'instant'}); const r = tip.getBoundingClientRect(); \
         return document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2).querySelector('title').textContent; })()",
    );
    let text = pointed_at.as_str().unwrap();
    assert!(text.starts_with("clipped, iteration 30: ") && text.ends_with(" %"), "{text}");
}

#[test]
fn a_figure_stays_on_one_line() {
    let Some(mut browser) = Browser::start() else { return };
    let (_dir, page) = page_of_a_run();
    browser.open(&page);
    for width in [1280, 800, 390, 320] {
        browser.look(width, 900, false);
        let rows = "(() => { const own = document.querySelectorAll('.figures div:nth-child(3) dd')[0]; \
                    own.textContent = '100 · 100 · 100 %'; const range = document.createRange(); \
                    range.selectNodeContents(own); const text = range.getBoundingClientRect(); \
                    const box = own.parentElement.getBoundingClientRect(); \
                    return [range.getClientRects().length, text.left >= box.left && text.right <= box.right]; })()";
        assert_eq!(browser.evaluate(rows), serde_json::json!([1, true]), "{width}");
    }
}

#[test]
fn a_table_that_goes_on_beyond_the_edge_shows_it() {
    let Some(mut browser) = Browser::start() else { return };
    let (_dir, page) = page_of_a_run();
    for is_dark in [false, true] {
        browser.look(390, 844, is_dark);
        browser.open(&page);
        // Three pixels below a caption, where no text is: at the left, in the middle, at the right.
        let mut strips = |scrolled: &str| {
            let places = browser.evaluate(&format!(
                "(() => {{ scrollTo(0, 0); const box = document.querySelector('.scroll'); box.scrollLeft = {scrolled}; \
                 const r = box.getBoundingClientRect(); const y = box.querySelector('caption').getBoundingClientRect().bottom - 5; \
                 return [r.left + 2, r.left + r.width / 2, r.right - 8].map(x => [x, y + scrollY, 6, 3]); }})()",
            ));
            let places: Vec<[f64; 4]> = serde_json::from_value(places).unwrap();
            places.into_iter().map(|place| browser.picture(place)).collect::<Vec<String>>()
        };
        let (start, end) = (strips("0"), strips("10000"));
        assert!(start[0] == start[1] && start[1] != start[2], "dark: {is_dark}");
        assert!(end[0] != end[1] && end[1] == end[2], "dark: {is_dark}");
    }
}

#[test]
fn the_page_fits_a_phone_and_follows_the_reader_s_colours() {
    let Some(mut browser) = Browser::start() else { return };
    let (_dir, page) = page_of_a_run();
    browser.look(390, 844, false);
    browser.open(&page);
    let overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth";
    assert!(browser.number(overflow) <= 0.0, "the page scrolls sideways on a phone");
    // The heading of a table that goes on beyond the edge is read without scrolling.
    let cut = "[...document.querySelectorAll('caption')].filter(c => { const range = document.createRange(); \
               range.selectNodeContents(c); return range.getBoundingClientRect().right > innerWidth; }).length";
    assert!(browser.number(cut) == 0.0, "a heading is cut");
    let smallest = "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => \
                    t.getBoundingClientRect().height))";
    assert!(browser.number(smallest) >= 8.0, "labels are too small to read");
    // Perceived lightness of a colour, 0 to 255.
    let light = |browser: &mut Browser, what: &str| {
        browser.number(&format!(
            "(() => {{ const [r, g, b] = getComputedStyle(document.body).{what}.match(/\\d+/g).map(Number); \
             return 0.3 * r + 0.59 * g + 0.11 * b; }})()"
        ))
    };
    for (is_dark, [page, ink]) in [(false, [200.0, 90.0]), (true, [60.0, 190.0])] {
        browser.look(1200, 900, is_dark);
        let found = [light(&mut browser, "backgroundColor"), light(&mut browser, "color")];
        let fits = match is_dark {
            false => found[0] > page && found[1] < ink,
            true => found[0] < page && found[1] > ink,
        };
        assert!(fits, "dark: {is_dark}, {found:?}");
        assert!(browser.number(overflow) <= 0.0);
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}
