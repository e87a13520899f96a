//! What a constitution may say, and who carries it.

use super::*;

const EXAMPLE: &str = include_str!("../../../../tests/fixtures/constitution.toml");

fn load(text: &str) -> Result<Constitution, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("constitution.toml");
    fs_err::write(&path, text).unwrap();
    Constitution::load(&path)
}

#[test]
fn the_draw_is_reproducible_and_uses_every_principle() {
    let constitution = load(EXAMPLE).unwrap();
    let principles = constitution.fitting(Aspect::ACTION).unwrap();
    let draw = |prompt: usize, seed, round| {
        draw(&principles, &format!("{prompt:016x}"), seed, round).id.clone()
    };
    assert_eq!(draw(3, 7, 0), draw(3, 7, 0));
    let first: Vec<_> = (0..64).map(|prompt| draw(prompt, 7, 0)).collect();
    let n_honesty = first.iter().filter(|id| *id == "honesty-1").count();
    assert!((16..=48).contains(&n_honesty), "{n_honesty}");
    assert_ne!(first, (0..64).map(|prompt| draw(prompt, 8, 0)).collect::<Vec<_>>());
    assert_ne!(first, (0..64).map(|prompt| draw(prompt, 7, 1)).collect::<Vec<_>>());
}

#[test]
fn principles_of_another_aspect_are_not_drawn() {
    let constitution = load(EXAMPLE).unwrap();
    let fitting = constitution.fitting(Aspect::MOTIVATION).unwrap();
    assert_eq!(fitting.iter().map(|p| p.id.as_str()).collect::<Vec<_>>(), ["honesty-1"]);
}

#[test]
fn the_shipped_constitution_loads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/constitution.toml");
    let constitution = Constitution::load(&path).unwrap();
    assert!(constitution.principles.len() >= 16);
}

#[test]
fn mistakes_in_the_file_are_named() {
    let error = |text: String| load(&text).unwrap_err().to_string();
    let unknown =
        error(EXAMPLE.replace("critique = \"Name what is un", "critic = \"Name what is un"));
    assert!(unknown.contains("constitution.toml") && unknown.contains("critic"), "{unknown}");
    assert!(error(EXAMPLE.replace("honesty-1", "respect-1")).contains("respect-1 twice"));
    assert!(error(EXAMPLE.replace("Rewrite it truthfully.", " ")).contains("principle.revision"));
    let courage = error(EXAMPLE.replace("virtue = \"respect\"", "virtue = \"courage\""));
    assert!(courage.contains("principle.virtue") && courage.contains("courage in respect-1"));
    let aspect = error(EXAMPLE.replace("aspect = \"action\"", "aspect = \"deed\""));
    assert!(aspect.contains("expected one of action, motivation, consequence"), "{aspect}");
    assert!(error(EXAMPLE.replace("Which answer is humbler?", "")).contains("virtues.humility"));
    assert!(error("[virtues]\n".to_owned()).contains("at least one virtue"));
    assert!(error("[virtues]\nRen = \"?\"".to_owned()).contains("begins with a letter"));
    let vice = "[virtues.ren]\nquestion = \"Which?\"\nexces = \"x\"";
    assert!(error(vice.to_owned()).contains("question, deficiency and excess"));
    let turns = |turns: &str| error(format!("{turns}[virtues]\nren = \"Which?\""));
    let turn = |name: &str, question: &str| format!("[[turn]]\nname = \"{name}\"\n{question}\n");
    let asked = "question = \"Why?\"";
    for (wrong, message) in [
        (turn("deed", asked), "turn deed: expected no question"),
        (turn("deed", "") + &turn("why", ""), "turn why: expected a question"),
        (turn("deed", "") + &turn("deed", asked), "turn deed: expected each name once"),
        (turn("seed", ""), "has a meaning in our files"),
    ] {
        let error = turns(&wrong);
        assert!(error.contains(message), "{error}");
    }
    let none = load("[virtues]\nren = \"Which?\"").unwrap();
    assert!(none.personas().unwrap_err().to_string().contains("[personas]"));
    let error = none.fitting(Aspect::ACTION).unwrap_err().to_string();
    assert!(error.contains("at least one [[principle]] for the action, found none"), "{error}");
}

const CONFUCIAN: &str = include_str!("../../../../tests/fixtures/confucian.toml");

#[test]
fn a_constitution_names_its_own_virtues_and_turns() {
    let constitution = load(CONFUCIAN).unwrap();
    assert_eq!(listed(&constitution.virtue_names()), "ren, yi, li, zhi");
    assert_eq!(listed(&constitution.turns.names()), "deed, reason");
    assert_eq!(constitution.turns.questions(), ["Why is this the right thing to do?"]);
    assert_eq!(constitution.virtues[0].deficiency.as_deref(), Some("coldness"));
    assert_eq!(constitution.virtues[2].excess, None);
    assert!(!constitution.has_shipped_names());
    // The five keep their order, wherever they stand.
    let lines: Vec<&str> = EXAMPLE.lines().collect();
    let at = lines.iter().position(|line| line.starts_with("honesty = ")).unwrap();
    let mut turned = lines.clone();
    turned[at..at + 5].reverse();
    let turned = load(&turned.join("\n")).unwrap();
    assert_eq!(turned.virtue_names(), Virtue::SHIPPED);
    assert!(turned.has_shipped_names());
}

#[test]
fn results_carry_a_constitution_of_other_names() {
    let dir = tempfile::tempdir().unwrap();
    let (own, stage) = (dir.path().join("own.toml"), dir.path().join("stage"));
    fs_err::create_dir(&stage).unwrap();
    fs_err::write(&own, EXAMPLE).unwrap();
    Constitution::load(&own).unwrap().leave(&stage).unwrap();
    assert_eq!(fs_err::read_dir(&stage).unwrap().count(), 0, "nothing to carry");
    assert_eq!(Turns::carried(&stage).unwrap(), Turns::default());
    fs_err::write(&own, CONFUCIAN).unwrap();
    Constitution::load(&own).unwrap().leave(&stage).unwrap();
    assert_eq!(fs_err::read_to_string(stage.join(FILE)).unwrap(), CONFUCIAN);
    // Beside a file of the results it is found as well.
    fs_err::write(stage.join("conversations.parquet"), "").unwrap();
    let beside = Constitution::of_stage(None, Some(&stage.join("conversations.parquet")));
    let beside = beside.unwrap().unwrap();
    assert_eq!(listed(&beside.turns.names()), "deed, reason");
    // Virtues may be others, turns may not.
    fs_err::write(&own, CONFUCIAN.replace("[virtues.zhi]", "[virtues.xin]")).unwrap();
    let given = Constitution::of_stage(Some(&own), Some(&stage)).unwrap().unwrap();
    assert_eq!(listed(&given.virtue_names()), "ren, yi, li, xin");
    fs_err::write(&own, CONFUCIAN.replace("Why is this", "Why would this be")).unwrap();
    let error = Constitution::of_stage(Some(&own), Some(&stage)).unwrap_err().to_string();
    assert!(error.contains("own.toml: turn 2: expected `reason`, asked \"Why is this"), "{error}");
}

#[test]
fn reward_models_of_two_constitutions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["deed", "reason"] {
        fs_err::create_dir_all(dir.path().join(name).join("adapter")).unwrap();
    }
    assert_eq!(Turns::of_reward_models(dir.path()).unwrap(), Turns::default());
    fs_err::write(dir.path().join("deed").join(FILE), CONFUCIAN).unwrap();
    let error = Turns::of_reward_models(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("reason: turn 1: expected `deed`") && error.contains("`action`"),
        "{error}"
    );
    fs_err::write(dir.path().join("reason").join(FILE), CONFUCIAN).unwrap();
    assert_eq!(Turns::of_reward_models(dir.path()).unwrap().len(), 2);
}

/// A device says that it has no size.
#[test]
fn only_a_regular_file_of_some_megabytes_is_read() {
    let message = Constitution::load(Path::new("/dev/zero")).unwrap_err().to_string();
    assert!(message.contains("/dev/zero: expected a regular file"), "{message}");
    let message = load(&"#".repeat(5 << 20)).unwrap_err().to_string();
    assert!(message.contains("at most 4194304 bytes"), "{message}");
}
