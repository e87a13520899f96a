//! What training would do, for `--dry-run`.

use anyhow::Result;
use arete_chain::Turns;
use arete_chain::memory::{PROMPT_TOKENS, Shape};
use arete_records::{Split, parquet};
use arete_stage::dry::DryRun;
use arete_stage::run;

use crate::stage::{PreferenceSource, TrainInputs, train};
use crate::{Config, data, sets};

/// What [`train`] would do; nothing is written.
///
/// # Errors
///
/// As [`train`], as far as it shows before the model is loaded.
pub fn dry_run(config: &Config, inputs: &TrainInputs) -> Result<DryRun> {
    let found = run::asking(|| train(config, inputs))?;
    let device = Some(config.compute.device.as_str());
    let shape = Shape::of(config.model.as_deref().unwrap_or_default(), device, PROMPT_TOKENS)?;
    let mut plan = DryRun::new("reward", config, found);
    match &inputs.preferences {
        PreferenceSource::Pairs(path) => {
            let columns = config.column.as_deref().unwrap_or_default();
            let (pairs, left_out) = data::read_pairs(path, columns)?;
            let splits = data::splits_of_pairs(&pairs);
            for split in Split::ALL {
                let n = splits.iter().filter(|own| **own == split).count();
                plan = plan.counting(split.name(), n);
            }
            plan = plan.counting("left_out", left_out.len());
        }
        PreferenceSource::Stage { dir, sets } => {
            for set in sets::wanted(dir, &Turns::carried(dir)?, sets)? {
                for split in Split::ALL {
                    let path = set.dir.join(format!("{split}.parquet"));
                    if path.is_file() {
                        let n = parquet::read_json(path)?.len();
                        plan = plan.counting(format!("{}/{split}", set.name), n);
                    }
                }
            }
        }
    }
    Ok(plan.taking(Some(shape.need(&config.demand()?).to_json())))
}
