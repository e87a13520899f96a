//! Policy and critic over one base, and their forward passes over a pack.

use anyhow::Result;
use arete_model::{Adapter, Decoder, LoraConfig, Pass, ScalarHead, Tensor, logprobs};
use arete_training::Passes;
use tch::Device;

use crate::config::{Config, CriticKind};
use crate::packs::Pack;

/// What estimates the value of a state.
#[derive(Debug)]
pub enum Critic {
    /// A head on the policy's hidden states.
    Trunk {
        /// The head.
        head: ScalarHead,
        /// Whether its gradients stop there.
        detached: bool,
    },
    /// A head on an adapter of its own.
    Adapter {
        /// The adapter.
        adapter: Adapter,
        /// The head.
        head: ScalarHead,
    },
}

/// Policy and critic over one base.
#[derive(Debug)]
pub struct Models<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// The policy's adapter.
    pub policy: Adapter,
    /// The critic; none where advantages come from groups.
    pub critic: Option<Critic>,
    /// How much goes into a pass with gradients, and what is kept of it.
    pub passes: Passes,
    temperature: f64,
}

/// Which of the two learn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learning {
    /// Policy and critic.
    Both,
    /// The critic alone, while it warms up.
    Critic,
    /// Neither: values only.
    Neither,
}

/// What the policy says of a pack.
pub(crate) struct PolicyPass<'a> {
    /// `[N, D]`: hidden states, for a critic on the same trunk.
    pub(crate) hidden: Tensor,
    /// `[n]` f32 on the CPU.
    pub(crate) logprob: Tensor,
    /// `[n]` f32 on the CPU; empty unless asked for.
    pub(crate) entropy: Tensor,
    /// For the backward pass, if the policy learns.
    pub(crate) pass: Option<Pass<'a>>,
}

/// What the critic says of a pack.
pub(crate) struct CriticPass<'a> {
    /// `[n]` f32 on the CPU.
    pub(crate) value: Tensor,
    /// For the backward pass through an adapter of its own, if that learns.
    pub(crate) pass: Option<Pass<'a>>,
}

/// Forward passes over a pack, kept for their backward passes.
pub(crate) struct Graph<'a> {
    pub(crate) policy: PolicyPass<'a>,
    /// None: computed when the policy's pass is over and its memory free again.
    pub(crate) critic: Option<CriticPass<'a>>,
}

impl<'a> Models<'a> {
    /// A policy that is the reference still, and a critic, if the algorithm has one, that says 0.
    ///
    /// # Errors
    ///
    /// The model's failure if the adapter's shape is impossible.
    pub fn new(decoder: &'a Decoder, config: &Config) -> Result<Self> {
        let lora: LoraConfig = config.lora.config();
        let (model, device) = (decoder.config(), decoder.device());
        let adapter = |name| -> Result<Adapter> {
            let mut adapter = Adapter::new(name, model, &lora, config.seed, device)?;
            adapter.set_trainable(true);
            Ok(adapter)
        };
        let critic = if config.algorithm.is_group() {
            None
        } else {
            let mut head = ScalarHead::zeros(model.hidden_size, device);
            head.set_trainable(true);
            Some(match config.value {
                CriticKind::Trunk => Critic::Trunk { head, detached: false },
                CriticKind::TrunkDetached => Critic::Trunk { head, detached: true },
                CriticKind::Adapter => Critic::Adapter { adapter: adapter("value")?, head },
            })
        };
        Ok(Self {
            decoder,
            policy: adapter("policy")?,
            critic,
            passes: config
                .compute
                .passes(config.micro_batch_tokens, false)
                .keeping_graphs(config.n_minibatches == 1 && config.keep_graph_tokens > 0),
            temperature: config.temperature,
        })
    }

    pub(crate) fn policy_pass<'s>(
        &'s self,
        pack: &'s Pack,
        learning: Learning,
        want_entropy: bool,
    ) -> Result<PolicyPass<'s>> {
        let batch = &pack.batch;
        let (hidden, pass) = if learning == Learning::Both {
            let pass = self.decoder.pass(batch, &self.policy, self.passes.recompute())?;
            (pass.hidden.shallow_clone(), Some(pass))
        } else {
            let _guard = tch::no_grad_guard();
            (self.decoder.forward(batch, Some(&self.policy))?, None)
        };
        let out = logprobs::of_rows(
            self.decoder,
            &hidden,
            batch,
            &pack.rows,
            self.temperature,
            want_entropy,
        )?;
        Ok(PolicyPass {
            hidden,
            logprob: out.logprob.to_device(Device::Cpu),
            entropy: out.entropy.to_device(Device::Cpu),
            pass,
        })
    }

    /// Whether there is one.
    pub(crate) fn has_critic(&self) -> bool {
        self.critic.is_some()
    }

    /// `trunk`: the policy's hidden states of the same pack.
    ///
    /// # Panics
    ///
    /// If there is no critic.
    pub(crate) fn critic_pass<'s>(
        &'s self,
        pack: &'s Pack,
        trunk: &Tensor,
        learns: bool,
    ) -> Result<CriticPass<'s>> {
        let _guard = (!learns).then(tch::no_grad_guard);
        let critic = self.critic.as_ref().expect("there is a critic");
        let (hidden, head, pass) = match critic {
            Critic::Trunk { head, detached: false } => (trunk.shallow_clone(), head, None),
            Critic::Trunk { head, detached: true } => (trunk.detach(), head, None),
            Critic::Adapter { adapter, head } if learns => {
                let pass = self.decoder.pass(&pack.batch, adapter, self.passes.recompute())?;
                (pass.hidden.shallow_clone(), head, Some(pass))
            }
            Critic::Adapter { adapter, head } => {
                (self.decoder.forward(&pack.batch, Some(adapter))?, head, None)
            }
        };
        let states = pack.states.to_device(self.decoder.device());
        let value = head.forward(&hidden.index_select(0, &states)).to_device(Device::Cpu);
        Ok(CriticPass { value, pass })
    }

    /// The critic's pass shares nothing with the policy's, and both learn: one after the other, memory holds one alone.
    pub(crate) fn in_turn(&self, learning: Learning) -> bool {
        learning == Learning::Both && matches!(self.critic, Some(Critic::Adapter { .. }))
    }

    /// The tensors that learn as policy.
    pub(crate) fn policy_parameters(&self) -> Vec<(String, Tensor)> {
        self.policy.parameters()
    }

    /// The tensors that learn as critic.
    pub(crate) fn critic_parameters(&self) -> Option<Vec<(String, Tensor)>> {
        let (head, mut parameters) = match self.critic.as_ref()? {
            Critic::Trunk { head, .. } => (head, Vec::new()),
            Critic::Adapter { adapter, head } => (head, adapter.parameters()),
        };
        parameters.push(("score.weight".to_owned(), head.weight.shallow_clone()));
        Some(parameters)
    }
}
