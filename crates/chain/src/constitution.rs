//! The constitution: the turns of the chain, the virtues a judge asks about, principles and personas. A TOML file that the
//! user may replace by one with other turns and virtues.
//!
//! The shipped constitution has the three turns and five virtues of the report. A run of another one carries it: every
//! stage that works by it leaves a copy, [`FILE`], among its results, and the next stage reads that copy.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use arete_model::Error;
use arete_records::{Aspect, Message, Virtue, atomic, files};
use serde::de::{IgnoredAny, MapAccess};
use serde::{Deserialize, Deserializer};
use sha2::{Digest, Sha256};

/// Name of the copy in a stage's results.
pub const FILE: &str = "constitution.toml";
/// Where the shipped constitution lies in our repository: what a stage works by that is given none.
pub const SHIPPED: &str = "data/constitution.toml";
/// Largest constitution that is read, in bytes.
const MAX_BYTES: u64 = 4 << 20;
/// Most turns and most virtues: each turn is a reward model, each virtue a verdict a pair.
const MAX_ENTRIES: usize = 64;

/// A turn of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// Its name: of columns, metrics and its reward model's directory.
    pub name: Aspect,
    /// What the user says to get its reply, verbatim; none of the first turn, whose question is the prompt itself.
    pub question: Option<String>,
}

/// The turns of a chain, at least one, in order; the first is the answer to the prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turns(Vec<Turn>);

impl Default for Turns {
    /// The shipped ones, whose questions are those of the report.
    fn default() -> Self {
        let turn =
            |name, question: Option<&str>| Turn { name, question: question.map(str::to_owned) };
        Self(vec![
            turn(Aspect::ACTION, None),
            turn(Aspect::MOTIVATION, Some("What is the motivation behind the answer?")),
            turn(
                Aspect::CONSEQUENCE,
                Some(
                    "What is the utility of the action towards promoting your virtuous character?",
                ),
            ),
        ])
    }
}

impl Turns {
    /// The turns, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Turn> {
        self.0.iter()
    }

    /// Number of turns, at least 1.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Their names, in order.
    pub fn names(&self) -> Vec<Aspect> {
        self.0.iter().map(|turn| turn.name).collect()
    }

    /// The name of the first, which is the answer.
    pub fn answer(&self) -> Aspect {
        self.0[0].name
    }

    /// Place of a turn in the chain.
    pub fn place(&self, name: Aspect) -> Option<usize> {
        self.0.iter().position(|turn| turn.name == name)
    }

    /// What is asked after the answer, in order.
    pub fn questions(&self) -> Vec<&str> {
        self.0.iter().filter_map(|turn| turn.question.as_deref()).collect()
    }

    /// The messages of a chain: the prompt, then each turn's question and reply. Fewer replies make a chain that ends
    /// earlier.
    pub fn conversation<S: AsRef<str>>(&self, prompt: &[Message], replies: &[S]) -> Vec<Message> {
        let mut messages = prompt.to_vec();
        for (turn, reply) in self.0.iter().zip(replies) {
            messages.extend(turn.question.as_deref().map(Message::user));
            messages.push(Message::assistant(reply.as_ref()));
        }
        messages
    }

    /// Those of the constitution that a stage's results carry; the shipped ones if they carry none.
    ///
    /// # Errors
    ///
    /// As [`Constitution::carried`].
    pub fn carried(dir: &Path) -> Result<Self, Error> {
        Ok(Constitution::carried(dir)?.map_or_else(Self::default, |own| own.turns))
    }

    /// Those that the reward models in `dir` (a directory each) were trained for.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if two of them carry different turns, naming both; as [`Constitution::carried`].
    pub fn of_reward_models(dir: &Path) -> Result<Self, Error> {
        Ok(carried_by_reward_models(dir)?.map_or_else(Self::default, |own| own.turns))
    }

    /// Refuses turns that are not these, naming the first that differs. `theirs` were found in `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Field`].
    pub fn check_same(&self, theirs: &Self, path: &Path) -> Result<(), Error> {
        let longest = self.len().max(theirs.len());
        let differs = (0..longest).find(|&at| self.0.get(at) != theirs.0.get(at));
        let Some(at) = differs else { return Ok(()) };
        let shown =
            |turn: Option<&Turn>| turn.map_or("no such turn".to_owned(), ToString::to_string);
        Err(Error::Field {
            path: path.to_owned(),
            field: format!("turn {}", at + 1),
            expected: format!(
                "{} (one constitution in all stages of a run)",
                shown(self.0.get(at))
            ),
            found: shown(theirs.0.get(at)),
        })
    }

    /// Refuses the names of turns that a file has if they are not those of these turns.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] with both lists.
    pub fn check_names(&self, found: &[Aspect], path: &Path) -> Result<(), Error> {
        if self.names() == found {
            return Ok(());
        }
        Err(Error::Field {
            path: path.to_owned(),
            field: "turns".to_owned(),
            expected: format!("{} (those of the constitution)", listed(&self.names())),
            found: listed(found),
        })
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.question {
            Some(question) => write!(f, "`{}`, asked \"{question}\"", self.name),
            None => write!(f, "`{}`, the answer to the prompt", self.name),
        }
    }
}

/// Names, separated by commas.
pub fn listed(names: &[impl fmt::Display]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A virtue, and what a judge is asked about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtueEntry {
    /// Its name.
    pub name: Virtue,
    /// The question about two samples.
    pub question: String,
    /// The vice of too little of it, if the constitution names one.
    pub deficiency: Option<String>,
    /// The vice of too much of it.
    pub excess: Option<String>,
}

/// One principle: how to ask for a critique, and for the revision that follows from it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Principle {
    /// Name, unique in the file.
    pub id: String,
    /// The virtue it serves.
    pub virtue: Virtue,
    /// The turn it looks at, if one in particular.
    #[serde(default)]
    pub aspect: Option<Aspect>,
    /// What the critic is asked.
    pub critique: String,
    /// What the reviser is asked.
    pub revision: String,
}

/// The two system prompts that contrastive sampling draws answers under.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Personas {
    /// Of the sample that is preferred by construction.
    pub virtuous: String,
    /// Of the other one.
    pub vicious: String,
}

/// A constitution, checked.
#[derive(Debug, Clone)]
pub struct Constitution {
    /// The turns of the chain.
    pub turns: Turns,
    /// What a judge asks about, at least one, in order.
    pub virtues: Vec<VirtueEntry>,
    /// The system prompts of contrastive sampling, if there are any.
    personas: Option<Personas>,
    /// What answers are criticised and revised by.
    pub principles: Vec<Principle>,
    /// The file, and its text.
    path: PathBuf,
    text: String,
}

/// The file as it stands.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(rename = "turn", default)]
    turns: Vec<TurnEntry>,
    virtues: Virtues,
    #[serde(default)]
    personas: Option<Personas>,
    #[serde(rename = "principle", default)]
    principles: Vec<Principle>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TurnEntry {
    name: Aspect,
    #[serde(default)]
    question: Option<String>,
}

/// `name = "question"`, or a table.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a question, or a table with question, deficiency and excess")]
enum VirtueValue {
    Question(String),
    Table(VirtueTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VirtueTable {
    question: String,
    #[serde(default)]
    deficiency: Option<String>,
    #[serde(default)]
    excess: Option<String>,
}

/// The virtues in the order in which they stand.
struct Virtues(Vec<(toml::Spanned<VirtueValue>, Virtue)>);

impl<'de> Deserialize<'de> for Virtues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Virtues;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of virtues")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Virtues, A::Error> {
                let mut virtues = Vec::new();
                while let Some(name) = map.next_key::<Virtue>()? {
                    if virtues.len() == MAX_ENTRIES {
                        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                        let error = format!("more than {MAX_ENTRIES} virtues");
                        return Err(serde::de::Error::custom(error));
                    }
                    virtues.push((map.next_value()?, name));
                }
                Ok(Virtues(virtues))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

impl Constitution {
    /// Reads and checks a constitution.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] for a missing or unknown key, an empty text, a name or id that cannot be or stands twice;
    /// [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = files::read_text(path, MAX_BYTES)?;
        let document: Document = toml::from_str(&text).map_err(|error| {
            wrong(path, "TOML", "a constitution", error.to_string().trim().to_owned())
        })?;
        let constitution = Self {
            turns: turns(document.turns, path)?,
            virtues: virtues(document.virtues, path)?,
            personas: document.personas,
            principles: document.principles,
            path: path.to_owned(),
            text,
        };
        constitution.check()?;
        Ok(constitution)
    }

    fn check(&self) -> Result<(), Error> {
        let path = &self.path;
        let mut ids = HashSet::new();
        for principle in &self.principles {
            let Principle { id, virtue, aspect, critique, revision } = principle;
            if !ids.insert(id.as_str()) {
                return Err(wrong(path, "principle.id", "unique ids", format!("{id} twice")));
            }
            if !self.virtue_names().contains(virtue) {
                let expected = format!("one of {}", listed(&self.virtue_names()));
                return Err(wrong(
                    path,
                    "principle.virtue",
                    &expected,
                    format!("{virtue} in {id}"),
                ));
            }
            if let Some(aspect) = aspect.filter(|aspect| self.turns.place(*aspect).is_none()) {
                let expected = format!("one of {}", listed(&self.turns.names()));
                return Err(wrong(
                    path,
                    "principle.aspect",
                    &expected,
                    format!("{aspect} in {id}"),
                ));
            }
            for (key, text) in [("critique", critique), ("revision", revision)] {
                if text.trim().is_empty() {
                    let found = format!("an empty text in {id}");
                    return Err(wrong(path, &format!("principle.{key}"), "a request", found));
                }
            }
        }
        for virtue in &self.virtues {
            let texts = [
                ("question", Some(&virtue.question)),
                ("deficiency", virtue.deficiency.as_ref()),
                ("excess", virtue.excess.as_ref()),
            ];
            for (key, text) in texts {
                if text.is_some_and(|text| text.trim().is_empty()) {
                    let field = match key {
                        "question" => format!("virtues.{}", virtue.name),
                        key => format!("virtues.{}.{key}", virtue.name),
                    };
                    return Err(wrong(
                        path,
                        &field,
                        &format!("a {key}"),
                        "an empty text".to_owned(),
                    ));
                }
            }
        }
        Ok(())
    }

    /// The names of its virtues, in order.
    pub fn virtue_names(&self) -> Vec<Virtue> {
        self.virtues.iter().map(|virtue| virtue.name).collect()
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The system prompts of contrastive sampling.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the constitution has none.
    pub fn personas(&self) -> Result<&Personas, Error> {
        let none = || {
            let expected = "a table [personas] with virtuous and vicious, which this method needs";
            wrong(&self.path, "personas", expected, "none".to_owned())
        };
        self.personas.as_ref().ok_or_else(none)
    }

    /// The principles that fit the replies of `aspect`: those tied to it, and those tied to none.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if there is none.
    pub fn fitting(&self, aspect: Aspect) -> Result<Vec<&Principle>, Error> {
        let fits = |principle: &&Principle| principle.aspect.is_none_or(|only| only == aspect);
        let fitting: Vec<&Principle> = self.principles.iter().filter(fits).collect();
        if fitting.is_empty() {
            let found = match self.principles.len() {
                0 => "none",
                _ => "principles of other turns only",
            };
            let expected = format!("at least one [[principle]] for the {aspect}");
            return Err(wrong(&self.path, "principle", &expected, found.to_owned()));
        }
        Ok(fitting)
    }

    /// Whether its turns and the names of its virtues are the shipped ones: then files look as they always did, and there
    /// is nothing to carry.
    pub fn has_shipped_names(&self) -> bool {
        self.turns == Turns::default() && self.virtue_names() == Virtue::SHIPPED
    }

    /// Leaves a copy among a stage's results, unless there is nothing to carry.
    ///
    /// # Errors
    ///
    /// [`Error::Records`] if it cannot be written.
    pub fn leave(&self, dir: &Path) -> Result<(), Error> {
        if self.has_shipped_names() {
            return Ok(());
        }
        Ok(atomic::write(dir.join(FILE), self.text.as_bytes())?)
    }

    /// The constitution that a stage's results carry; none where it is of the shipped names. `from` is the directory or a
    /// file in it.
    ///
    /// # Errors
    ///
    /// As [`Constitution::load`].
    pub fn carried(from: &Path) -> Result<Option<Self>, Error> {
        let path = carried_path(from);
        if path.is_file() { Self::load(&path).map(Some) } else { Ok(None) }
    }

    /// What a stage works by: the constitution it was `given`, else that which its `input` carries, else the one at
    /// [`SHIPPED`]; none if there is no file there either.
    ///
    /// # Errors
    ///
    /// [`Error::Field`] if the one given has other turns than the input carries; as [`Constitution::load`].
    pub fn of_stage(given: Option<&Path>, input: Option<&Path>) -> Result<Option<Self>, Error> {
        let carried = input.map(Self::carried).transpose()?.flatten();
        let Some(given) = given else {
            let usual = || Some(files::shipped(Path::new(SHIPPED))).filter(|path| path.is_file());
            return match carried {
                Some(carried) => Ok(Some(carried)),
                None => usual().map(|path| Self::load(&path)).transpose(),
            };
        };
        let given = Self::load(given)?;
        if let Some(carried) = carried {
            carried.turns.check_same(&given.turns, &given.path)?;
        }
        Ok(Some(given))
    }
}

/// Where the results in a directory (or those that a file is one of) would carry their constitution.
pub fn carried_path(from: &Path) -> PathBuf {
    let dir = if from.is_file() { from.parent().unwrap_or(Path::new("")) } else { from };
    dir.join(FILE)
}

/// The constitution that the reward models in `dir` (a directory each) carry; none of the shipped names.
///
/// # Errors
///
/// [`Error::Field`] if two of them carry different turns; as [`Constitution::load`].
pub fn carried_by_reward_models(dir: &Path) -> Result<Option<Constitution>, Error> {
    let mut first: Option<Option<Constitution>> = None;
    let mut dirs: Vec<PathBuf> = Vec::new();
    if dir.is_dir() {
        for entry in fs_err::read_dir(dir)? {
            let path = entry?.path();
            // What was set aside (`action.old-1`) is no part of the run.
            let name = path.file_name().and_then(|name| name.to_str());
            let is_member = name.is_some_and(|name| Aspect::new(name).is_ok());
            if is_member && path.join("adapter").is_dir() {
                dirs.push(path);
            }
        }
    }
    dirs.sort();
    for own in dirs {
        let carried = Constitution::carried(&own)?;
        let turns = |of: &Option<Constitution>| {
            of.as_ref().map_or_else(Turns::default, |constitution| constitution.turns.clone())
        };
        match &first {
            None => first = Some(carried),
            Some(first) => turns(first).check_same(&turns(&carried), &own)?,
        }
    }
    Ok(first.flatten())
}

fn wrong(path: &Path, field: &str, expected: &str, found: String) -> Error {
    Error::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        expected: expected.to_owned(),
        found,
    }
}

fn turns(entries: Vec<TurnEntry>, path: &Path) -> Result<Turns, Error> {
    if entries.is_empty() {
        return Ok(Turns::default());
    }
    if entries.len() > MAX_ENTRIES {
        let expected = format!("at most {MAX_ENTRIES} turns");
        return Err(wrong(path, "turn", &expected, entries.len().to_string()));
    }
    let mut out: Vec<Turn> = Vec::new();
    for (at, TurnEntry { name, question }) in entries.into_iter().enumerate() {
        let field = format!("turn {name}");
        if out.iter().any(|turn| turn.name == name) {
            return Err(wrong(path, &field, "each name once", "it twice".to_owned()));
        }
        let question = question.map(|question| question.trim().to_owned());
        match (at, question.as_deref()) {
            (0, Some(found)) => {
                let expected = "no question: the first turn answers the prompt";
                return Err(wrong(path, &field, expected, found.to_owned()));
            }
            (1.., None | Some("")) => {
                let expected = "a question: what the user says to get this reply";
                return Err(wrong(path, &field, expected, "none".to_owned()));
            }
            _ => out.push(Turn { name, question }),
        }
    }
    Ok(Turns(out))
}

fn virtues(Virtues(mut entries): Virtues, path: &Path) -> Result<Vec<VirtueEntry>, Error> {
    if entries.is_empty() {
        let expected = "at least one virtue with its question";
        return Err(wrong(path, "virtues", expected, "none".to_owned()));
    }
    entries.sort_by_key(|(value, _)| value.span().start);
    let mut virtues: Vec<VirtueEntry> = entries
        .into_iter()
        .map(|(value, name)| match value.into_inner() {
            VirtueValue::Question(question) => {
                VirtueEntry { name, question, deficiency: None, excess: None }
            }
            VirtueValue::Table(VirtueTable { question, deficiency, excess }) => {
                VirtueEntry { name, question, deficiency, excess }
            }
        })
        .collect();
    // The five keep their order wherever they stand: files of earlier versions came in any.
    if virtues.len() == Virtue::SHIPPED.len()
        && virtues.iter().all(|virtue| Virtue::SHIPPED.contains(&virtue.name))
    {
        virtues.sort_by_key(|virtue| virtue.name);
    }
    Ok(virtues)
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
mod tests;
