//! What the gold protocol found (`scripts/experiments/gold.py`): how far policies climbed by the gold judge, against the KL it took.

use serde::{Deserialize, Serialize};

/// The contents of `gold/gold.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gold {
    /// A point each, arm by arm.
    pub points: Vec<GoldPoint>,
}

/// Where a policy was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GoldPoint {
    /// What it climbed by: `best of n`, `rloo, min`, `dpo`, …
    pub arm: String,
    /// Its seed.
    pub seed: u64,
    /// Whose prompts it answered: `held out`, `validation`, `test`.
    pub prompts: String,
    /// Square root of the KL from the base, nats a reply.
    pub sqrt_kl: f64,
    /// What it gained over the base by the gold judge.
    pub gold: f64,
    /// Lower end of its 95 % interval, of this policy only; none where it was not taken.
    pub gold_low: Option<f64>,
    /// Upper end.
    pub gold_high: Option<f64>,
    /// Its score by what it climbed.
    pub proxy: f64,
}

impl Gold {
    /// Lines over √KL: one a path (the points of an arm and seed that are not of test prompts), and one through the ends of a family
    /// that has nothing else, as DPO has with several beta.
    pub fn paths(&self, value: impl Fn(&GoldPoint) -> f64) -> Vec<(String, Vec<(f64, f64)>)> {
        let has_seeds = self.points.iter().any(|point| point.seed > 0);
        let mut paths: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        for point in &self.points {
            let has_way = |own: &GoldPoint| own.arm == point.arm && own.prompts != "test";
            if point.prompts == "test" && self.points.iter().any(has_way) {
                continue;
            }
            let name = match has_seeds && !point.arm.starts_with("best of n") {
                true => format!("{} ({})", point.arm, point.seed),
                false => point.arm.clone(),
            };
            let at = (point.sqrt_kl, value(point));
            match paths.iter_mut().find(|(own, _)| *own == name) {
                Some((_, path)) => path.push(at),
                None => paths.push((name, vec![at])),
            }
        }
        paths.iter_mut().for_each(|(_, path)| path.sort_by(|a, b| a.0.total_cmp(&b.0)));
        paths
    }

    /// Of every arm the point at which the gold judge saw most gained, on the prompts of its path.
    pub fn best(&self) -> Vec<&GoldPoint> {
        let mut best: Vec<&GoldPoint> = Vec::new();
        for point in self.points.iter().filter(|point| point.gold.is_finite()) {
            let same = |own: &&mut &GoldPoint| own.arm == point.arm && own.prompts == point.prompts;
            match best.iter_mut().find(same) {
                Some(own) if point.gold > own.gold => *own = point,
                Some(_) => {}
                None => best.push(point),
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(arm: &str, prompts: &str, sqrt_kl: f64, gold: f64) -> GoldPoint {
        let [arm, prompts] = [arm, prompts].map(str::to_owned);
        GoldPoint {
            arm,
            seed: 0,
            prompts,
            sqrt_kl,
            gold,
            gold_low: None,
            gold_high: None,
            proxy: 0.0,
        }
    }

    #[test]
    fn a_path_is_in_the_order_of_kl_and_ends_alone_make_one() {
        let gold = Gold {
            points: vec![
                point("rloo", "validation", 0.0, 0.0),
                point("rloo", "validation", 2.0, 0.3),
                point("rloo", "validation", 1.0, 0.5),
                point("rloo", "test", 2.0, 0.2),
                point("dpo", "test", 3.0, 0.4),
                point("dpo", "test", 1.5, 0.1),
            ],
        };
        let paths = gold.paths(|point| point.gold);
        assert_eq!(paths[0], ("rloo".to_owned(), vec![(0.0, 0.0), (1.0, 0.5), (2.0, 0.3)]));
        assert_eq!(paths[1], ("dpo".to_owned(), vec![(1.5, 0.1), (3.0, 0.4)]));
        let best: Vec<f64> = gold.best().iter().map(|point| point.gold).collect();
        assert_eq!(best, [0.5, 0.2, 0.4]);
    }
}
