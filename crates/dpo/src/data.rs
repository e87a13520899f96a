//! Preference pairs: rendered, the tokens that count found, cut, and their common prompt found.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use arete_chain::Ruled;
use arete_chain::batches::n_common;
use arete_chain::pairs::{self, Conversation, LabelledPair};
use arete_model::Chat;
use arete_records::left_out::{self, LeftOut};
use arete_records::table::Column;
use arete_records::{Message, Refusal, Role, Split};
use arete_training::not_rendered;

use crate::config::{Label, OverLength};

/// Name of the file of pairs to train on, in an aspect's directory.
const TRAIN: &str = "train.parquet";
/// Name of the file of pairs to evaluate on.
const VALIDATION: &str = "validation.parquet";

/// A tokenised conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// The tokens through the last that counts, cut to the longest length.
    pub token_ids: Vec<i64>,
    /// Places of the tokens whose log-probability counts, ascending; never the first token.
    pub counted: Vec<usize>,
    /// Tokens of the assistant's own in the whole conversation, before cutting.
    pub n_own_tokens: usize,
}

/// A tokenised pair.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The better side.
    pub chosen: Sequence,
    /// The worse side.
    pub rejected: Sequence,
    /// Leading tokens that both share and that are computed once; none of them counts.
    pub n_shared: usize,
    /// What the loss aims at.
    pub chosen_prob: f64,
    /// Index of its aspect.
    pub aspect: usize,
}

impl Pair {
    /// # Panics
    ///
    /// If a side has no token that counts.
    pub fn new(chosen: Sequence, rejected: Sequence, chosen_prob: f64, aspect: usize) -> Self {
        let first = |side: &Sequence| *side.counted.first().expect("checked by `tokenize`");
        let common = n_common(&chosen.token_ids, &rejected.token_ids);
        let n_shared = common.min(first(&chosen)).min(first(&rejected));
        Self { chosen, rejected, n_shared, chosen_prob, aspect }
    }

    /// Tokens that go through the model.
    pub fn n_tokens(&self) -> usize {
        self.chosen.token_ids.len() + self.rejected.token_ids.len() - self.n_shared
    }
}

/// Tokenised pairs, and what happened to the others.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pairs {
    /// In the order of aspects and files.
    pub pairs: Vec<Pair>,
    /// What the null rulers see of each.
    pub ruled: Vec<Ruled>,
    /// Pairs of which a side was cut.
    pub n_cut: usize,
    /// Pairs left out for their length.
    pub n_dropped: usize,
    /// Pairs left out because their sides are the same tokens (after cutting).
    pub n_identical: usize,
    /// Pairs left out because nothing that counts was left of a side.
    pub n_empty: usize,
    /// Pairs with a side that was left open, without the end of its last turn.
    pub n_open: usize,
    /// Pairs that the template refuses.
    pub left_out: Vec<LeftOut>,
}

/// Where pairs come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PairSource {
    /// A directory of preferences, with `<aspect>/{train,validation}.parquet`.
    Preferences(PathBuf),
    /// A file of labelled pairs in any layout of [`arete_chain::pairs`]; its training split is trained on, the rest held out.
    Pairs(PathBuf),
}

impl PairSource {
    /// The directory or file.
    pub fn path(&self) -> &Path {
        match self {
            Self::Preferences(path) | Self::Pairs(path) => path,
        }
    }

    /// The sets of pairs to train on: of preferences the `wanted` aspects in their order, or all by name; of a file its one.
    ///
    /// # Errors
    ///
    /// A refused setting if there is no aspect, or a wanted one is not there, or a file is asked for an aspect.
    pub fn sets(&self, wanted: &[String]) -> Result<Vec<PairSet>> {
        let dir = match self {
            Self::Preferences(dir) => dir,
            Self::Pairs(file) if wanted.is_empty() => {
                let name = "pairs".to_owned();
                return Ok(vec![PairSet { name, files: SetFiles::One(file.clone()) }]);
            }
            Self::Pairs(_) => {
                let expected = "none with --pairs, whose pairs are of one set";
                bail!(Refusal::setting("aspects", expected, wanted.join(", ")));
            }
        };
        let set = |name: String| {
            let train = dir.join(&name).join(TRAIN);
            // Of few prompts none may be left of this split: the stage before writes no file of it then.
            let validation = Some(dir.join(&name).join(VALIDATION)).filter(|path| path.is_file());
            let files = SetFiles::Splits { train, validation };
            PairSet { name, files }
        };
        Ok(aspects(dir, wanted)?.into_iter().map(set).collect())
    }
}

/// One set of pairs: those of an aspect, or of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PairSet {
    /// The aspect's name, or "pairs".
    pub name: String,
    files: SetFiles,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum SetFiles {
    /// Pairs to train on, and pairs to evaluate on.
    Splits { train: PathBuf, validation: Option<PathBuf> },
    /// Both in one file, split by their opening question.
    One(PathBuf),
}

impl PairSet {
    /// The files, each with the name it has among the inputs of the run.
    pub fn inputs(&self) -> Vec<(String, PathBuf)> {
        let Self { name, files } = self;
        match files {
            SetFiles::Splits { train, validation } => {
                [("train", Some(train)), ("validation", validation.as_ref())]
                    .into_iter()
                    .filter_map(|(split, path)| Some((format!("{name}/{split}"), path?.clone())))
                    .collect()
            }
            SetFiles::One(file) => vec![(name.clone(), file.clone())],
        }
    }

    /// Reads the pairs.
    ///
    /// # Errors
    ///
    /// A file's failure if it is unusable.
    pub fn read(&self, columns: &[Column]) -> Result<ReadPairs> {
        match &self.files {
            SetFiles::Splits { train, validation } => {
                let read = |path: &PathBuf| -> Result<(PathBuf, Vec<LabelledPair>)> {
                    Ok((path.clone(), pairs::read_preferences(path)?))
                };
                let validation = validation.as_ref().map(read).transpose()?;
                let none = || (train.clone(), Vec::new());
                Ok(ReadPairs {
                    train: read(train)?,
                    validation: validation.unwrap_or_else(none),
                    left_out: Vec::new(),
                })
            }
            SetFiles::One(file) => {
                let (all, left_out) = pairs::read_pairs(file, columns)?;
                let splits = pairs::splits_of_pairs(&all);
                let (train, held_out): (Vec<_>, Vec<_>) =
                    all.into_iter().zip(splits).partition(|(_, split)| *split == Split::Train);
                let of = |pairs: Vec<(LabelledPair, Split)>| {
                    (file.clone(), pairs.into_iter().map(|(pair, _)| pair).collect())
                };
                Ok(ReadPairs { train: of(train), validation: of(held_out), left_out })
            }
        }
    }
}

/// The pairs of a set, each split with the file that it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct ReadPairs {
    /// Pairs to train on.
    pub train: (PathBuf, Vec<LabelledPair>),
    /// Pairs to evaluate on.
    pub validation: (PathBuf, Vec<LabelledPair>),
    /// Records that are no such pairs.
    pub left_out: Vec<LeftOut>,
}

/// The aspects of a preferences directory: the wanted ones in their order, or all, by name.
fn aspects(dir: &Path, wanted: &[String]) -> Result<Vec<String>> {
    if dir.is_file() {
        bail!(Refusal::file(
            dir,
            "",
            "a directory of preferences (--pairs takes a file)",
            "a file"
        ));
    }
    let mut there: Vec<String> = fs_err::read_dir(dir)?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            path.join(TRAIN).is_file().then(|| path.file_name()?.to_str().map(str::to_owned))?
        })
        .collect();
    there.sort();
    let missing = |got: String| {
        Refusal::setting(
            "aspects",
            format!("some of those in {}: {}", dir.display(), listed(&there)),
            got,
        )
    };
    if there.is_empty() {
        bail!(missing("a directory without <aspect>/train.parquet".to_owned()));
    }
    if let Some(unknown) = wanted.iter().find(|name| !there.contains(name)) {
        bail!(missing(unknown.clone()));
    }
    Ok(if wanted.is_empty() { there } else { wanted.to_vec() })
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// How pairs become tokens.
#[derive(Clone, Copy, Debug)]
pub struct Rendering {
    /// Most tokens of a conversation.
    pub max_length: usize,
    /// What happens to longer ones.
    pub over_length: OverLength,
    /// What the loss aims at.
    pub label: Label,
}

/// Tokenises the pairs of a file, and adds them to `out` as those of `aspect`.
///
/// # Errors
///
/// If the template refuses more than a [share](left_out::is_share) of them; fewer are left out and named.
pub fn tokenize(
    out: &mut Pairs,
    path: &Path,
    preferences: &[LabelledPair],
    aspect: usize,
    chat: &Chat<'_>,
    rendering: &Rendering,
) -> Result<()> {
    let Rendering { max_length, over_length, label } = *rendering;
    let mut n_refused = 0;
    for preference in preferences {
        let n_shared_replies = n_shared_replies(preference);
        let side = |conversation| {
            sequence(conversation, n_shared_replies, chat)
                .with_context(|| not_rendered(path, preference.row))
        };
        let (mut chosen, mut rejected) =
            match side(&preference.chosen).and_then(|own| Ok((own, side(&preference.rejected)?))) {
                Ok(sides) => sides,
                Err(error) => {
                    out.left_out.push(pairs::of_row(path, preference.row, format!("{error:#}")));
                    n_refused += 1;
                    if !left_out::is_share(n_refused, preferences.len()) {
                        return Err(error);
                    }
                    continue;
                }
            };
        let is_long = chosen.token_ids.len().max(rejected.token_ids.len()) > max_length;
        if is_long && over_length == OverLength::Drop {
            out.n_dropped += 1;
            continue;
        }
        cut_pair(&mut chosen, &mut rejected, max_length, over_length);
        if chosen.token_ids == rejected.token_ids {
            out.n_identical += 1;
            continue;
        }
        if chosen.counted.is_empty() || rejected.counted.is_empty() {
            out.n_empty += 1;
            continue;
        }
        out.n_cut += usize::from(is_long);
        out.n_open += usize::from(preference.chosen.truncated || preference.rejected.truncated);
        let chosen_prob = match label {
            Label::Soft => f64::from(preference.chosen_prob),
            Label::Hard => 1.0,
        };
        out.pairs.push(Pair::new(chosen, rejected, chosen_prob, aspect));
        out.ruled.push(Ruled::of(&preference.chosen.messages, &preference.rejected.messages));
    }
    Ok(())
}

/// Replies among the messages with which both sides begin.
fn n_shared_replies(preference: &LabelledPair) -> usize {
    let sides = preference.chosen.messages.iter().zip(&preference.rejected.messages);
    let common = sides.take_while(|(a, b)| a == b).map(|(message, _)| message);
    common.filter(|message: &&Message| message.role == Role::Assistant).count()
}

/// The conversation as tokens, through the last that counts. Nothing after that one changes its log-probability.
fn sequence(
    conversation: &Conversation,
    n_shared_replies: usize,
    chat: &Chat<'_>,
) -> Result<Sequence, arete_model::Error> {
    let rendered = if conversation.truncated {
        chat.render_truncated(&conversation.messages)?
    } else {
        chat.render(&conversation.messages)?
    };
    let mut token_ids = rendered.token_ids;
    let counted = counted(&rendered.own, n_shared_replies);
    token_ids.truncate(counted.last().map_or(0, |last| last + 1));
    let n_own_tokens = rendered.own.iter().filter(|&&own| own).count();
    Ok(Sequence { token_ids, counted, n_own_tokens })
}

/// Places of the policy's own tokens after the first replies, of which each is one run of them.
fn counted(own: &[bool], n_shared_replies: usize) -> Vec<usize> {
    let mut n_replies = 0;
    let mut counted = Vec::new();
    for (place, &is_own) in own.iter().enumerate() {
        let begins = is_own && (place == 0 || !own[place - 1]);
        n_replies += usize::from(begins);
        if is_own && n_replies > n_shared_replies && place > 0 {
            counted.push(place);
        }
    }
    counted
}

/// Removes a sequence's first `n` tokens. The new first token cannot count: nothing predicts it.
fn drop_left(sequence: &mut Sequence, n: usize) {
    drop(sequence.token_ids.drain(..n));
    sequence.counted.retain(|&place| place > n);
    sequence.counted.iter_mut().for_each(|place| *place -= n);
}

/// Cuts the sides of a pair. On the left, both lose the same tokens as long as these are common to both: then they are
/// compared in the same context, and what they share is still computed once.
fn cut_pair(
    chosen: &mut Sequence,
    rejected: &mut Sequence,
    max_length: usize,
    over_length: OverLength,
) {
    let excess = chosen.token_ids.len().max(rejected.token_ids.len()).saturating_sub(max_length);
    match over_length {
        OverLength::TruncateLeft => {
            let is_common = excess < n_common(&chosen.token_ids, &rejected.token_ids);
            for side in [chosen, rejected] {
                let own = side.token_ids.len().saturating_sub(max_length);
                drop_left(side, if is_common { excess } else { own });
            }
        }
        OverLength::TruncateRight | OverLength::Drop => {
            for side in [chosen, rejected] {
                side.token_ids.truncate(max_length);
                side.counted.retain(|&place| place < max_length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(token_ids: &[i64], counted: &[usize]) -> Sequence {
        Sequence { token_ids: token_ids.to_vec(), counted: counted.to_vec(), n_own_tokens: 1 }
    }

    #[test]
    fn the_replies_after_the_shared_ones_count() {
        let own = [false, true, true, false, true, false, true, true];
        assert_eq!(counted(&own, 0), [1, 2, 4, 6, 7]);
        assert_eq!(counted(&own, 1), [4, 6, 7]);
        assert_eq!(counted(&own, 3), [0; 0]);
        // Nothing predicts a first token.
        assert_eq!(counted(&[true, true], 0), [1]);
    }

    #[test]
    fn what_is_shared_ends_where_counting_begins() {
        let shared = |a: &[i64], b: &[i64], from: usize| {
            let side = |ids: &[i64]| sequence(ids, &(from..ids.len()).collect::<Vec<_>>());
            Pair::new(side(a), side(b), 1.0, 0)
        };
        // The replies begin alike (3), but that token counts on either side.
        let pair = shared(&[1, 2, 3, 4], &[1, 2, 3, 9, 9], 2);
        assert_eq!((pair.n_shared, pair.n_tokens()), (2, 7));
        // The prompts part before.
        assert_eq!(shared(&[1, 5, 3], &[1, 6, 3], 2).n_shared, 1);
    }

    #[test]
    fn cutting_moves_the_places_that_count() {
        let cut = |a: &Sequence, b: &Sequence, over_length| {
            let (mut a, mut b) = (a.clone(), b.clone());
            cut_pair(&mut a, &mut b, 4, over_length);
            (a, b)
        };
        let (a, b) = (sequence(&[1, 2, 3, 8, 9], &[3, 4]), sequence(&[1, 2, 3, 7], &[3]));
        // The longer side's excess is one, which is common: both lose the 1.
        let left = cut(&a, &b, OverLength::TruncateLeft);
        assert_eq!(left, (sequence(&[2, 3, 8, 9], &[2, 3]), sequence(&[2, 3, 7], &[2])));
        let right = cut(&a, &b, OverLength::TruncateRight);
        assert_eq!(right, (sequence(&[1, 2, 3, 8], &[3]), b.clone()));
        // A cut into the reply leaves its first token without a predecessor.
        let long = sequence(&[1, 5, 6, 7, 8, 9], &[1, 2, 3, 4, 5]);
        let (long, _) = cut(&long, &sequence(&[2, 5], &[1]), OverLength::TruncateLeft);
        assert_eq!(long, sequence(&[6, 7, 8, 9], &[1, 2, 3]));
    }

    #[test]
    fn aspects_are_those_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["motivation", "action", "other"] {
            fs_err::create_dir_all(dir.path().join(name)).unwrap();
        }
        let names = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|&name| name.to_owned()).collect();
            aspects(dir.path(), &wanted)
        };
        assert!(names(&[]).unwrap_err().to_string().contains("train.parquet"));
        for name in ["motivation", "action"] {
            fs_err::write(dir.path().join(name).join(TRAIN), "").unwrap();
        }
        assert_eq!(names(&[]).unwrap(), ["action", "motivation"]);
        assert_eq!(names(&["motivation"]).unwrap(), ["motivation"]);
        let error = names(&["other"]).unwrap_err().to_string();
        assert!(error.contains("action, motivation, got other"), "{error}");
    }
}
