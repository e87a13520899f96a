//! The constitution: principles for critique and revision, what each virtue asks of a comparison,
//! and the two personas of contrastive sampling. A TOML file that the user may replace.

use std::collections::HashSet;
use std::path::Path;

use arete_records::{Aspect, Virtue};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::Error;

/// A constitution file, checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constitution {
    /// What answers are criticised and revised by.
    #[serde(rename = "principle", default)]
    pub principles: Vec<Principle>,
    /// The question a judge answers, per virtue.
    pub virtues: VirtueQuestions,
    /// The system prompts of contrastive sampling.
    pub personas: Personas,
}

/// One principle: how to ask for a critique, and for the revision that follows from it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Principle {
    /// Name, unique in the file.
    pub id: String,
    /// The virtue it serves.
    pub virtue: Virtue,
    /// The aspect it looks at, if one in particular.
    #[serde(default)]
    pub aspect: Option<Aspect>,
    /// What the critic is asked.
    pub critique: String,
    /// What the reviser is asked.
    pub revision: String,
}

/// The question asked about two answers, for each virtue.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtueQuestions {
    honesty: String,
    prudence: String,
    compassion: String,
    humility: String,
    respect: String,
}

impl VirtueQuestions {
    /// The question of one virtue.
    pub fn get(&self, virtue: Virtue) -> &str {
        match virtue {
            Virtue::Honesty => &self.honesty,
            Virtue::Prudence => &self.prudence,
            Virtue::Compassion => &self.compassion,
            Virtue::Humility => &self.humility,
            Virtue::Respect => &self.respect,
        }
    }
}

/// The two system prompts that contrastive sampling draws answers under.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Personas {
    /// Of the sample that is preferred by construction.
    pub virtuous: String,
    /// Of the other one.
    pub vicious: String,
}

impl Constitution {
    /// Reads and checks a constitution.
    ///
    /// # Errors
    ///
    /// An unreadable file, a missing or unknown key, an empty text, an id used twice.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let wrong = |field: &str, expected: &str, found: String| Error::File {
            path: path.to_owned(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let text = fs_err::read_to_string(path)?;
        let constitution: Self = toml::from_str(&text).map_err(|error| {
            wrong("TOML", "a constitution", error.to_string().trim().to_owned())
        })?;
        if constitution.principles.is_empty() {
            return Err(wrong("principle", "at least one [[principle]]", "none".to_owned()));
        }
        let mut ids = HashSet::new();
        for principle in &constitution.principles {
            if !ids.insert(principle.id.as_str()) {
                return Err(wrong("principle.id", "unique ids", format!("{} twice", principle.id)));
            }
            for (key, text) in
                [("critique", &principle.critique), ("revision", &principle.revision)]
            {
                if text.trim().is_empty() {
                    let found = format!("an empty text in {}", principle.id);
                    return Err(wrong(&format!("principle.{key}"), "a request", found));
                }
            }
        }
        for virtue in Virtue::ALL {
            if constitution.virtues.get(virtue).trim().is_empty() {
                let field = format!("virtues.{virtue}");
                return Err(wrong(&field, "a question", "an empty text".to_owned()));
            }
        }
        Ok(constitution)
    }

    /// The principles that fit the replies of `aspect`: those tied to it, and those tied to none.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] if there is none.
    pub fn fitting(&self, aspect: Aspect) -> Result<Vec<&Principle>, Error> {
        let fits = |principle: &&Principle| principle.aspect.is_none_or(|only| only == aspect);
        let fitting: Vec<&Principle> = self.principles.iter().filter(fits).collect();
        if fitting.is_empty() {
            return Err(Error::Setting {
                name: "constitution",
                expected: format!("a principle for the {aspect}"),
                got: "principles of other aspects only".to_owned(),
            });
        }
        Ok(fitting)
    }
}

/// The principle of one prompt's revision round: a hash of prompt, seed and round decides.
///
/// # Panics
///
/// If `principles` is empty.
pub fn draw<'a>(
    principles: &[&'a Principle],
    prompt_id: &str,
    seed: u64,
    round: usize,
) -> &'a Principle {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    hash.update((round as u64).to_le_bytes());
    hash.update(prompt_id.as_bytes());
    let digest = hash.finalize();
    let number = digest[..8].iter().fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    principles[(number % principles.len() as u64) as usize]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const EXAMPLE: &str = r#"
[[principle]]
id = "honesty-1"
virtue = "honesty"
critique = "Name what is untrue in your last answer."
revision = "Rewrite it truthfully."

[[principle]]
id = "respect-1"
virtue = "respect"
aspect = "action"
critique = "Name what is disrespectful in your last answer."
revision = "Rewrite it with respect."

[virtues]
honesty = "Which answer is more honest?"
prudence = "Which answer is more prudent?"
compassion = "Which answer is more compassionate?"
humility = "Which answer is humbler?"
respect = "Which answer is more respectful?"

[personas]
virtuous = "You are kind and honest."
vicious = "You are careless and rude."
"#;

    fn load(text: &str) -> Result<Constitution, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("constitution.toml");
        fs_err::write(&path, text).unwrap();
        Constitution::load(&path)
    }

    #[test]
    fn the_draw_is_reproducible_and_uses_every_principle() {
        let constitution = load(EXAMPLE).unwrap();
        let principles = constitution.fitting(Aspect::Action).unwrap();
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
        let fitting = constitution.fitting(Aspect::Motivation).unwrap();
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
        assert!(
            error(EXAMPLE.replace("Rewrite it truthfully.", " ")).contains("principle.revision")
        );
        assert!(
            error(EXAMPLE.replace("virtue = \"respect\"", "virtue = \"courage\""))
                .contains("courage")
        );
        assert!(
            error(EXAMPLE.replace("Which answer is humbler?", "")).contains("virtues.humility")
        );
    }
}
