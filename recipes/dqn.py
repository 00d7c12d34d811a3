"""Reinforcement learning: DQN on CartPole, each rank with environments and a replay memory of its own.

To expect: a mean return of 475 or more over 100 episodes (500 is the most there is), at which the training ends. On two
ranks of one CPU core each, seeds 0, 1 and 2: 485.9, 500.0 and 486.8 after 1750, 1250 and 1250 steps, in 40 s each.

    hvdtrain launch -np 2 dqn --episodes 100 --seed 0

Sources: Mnih et al., "Human-level control through deep reinforcement learning" (Nature 518, 2015), with the targets of
van Hasselt et al. (1509.06461) and n-step returns, as in Hessel et al. (1710.02298). The environment is Gymnasium's
(`pip install 'hvdtrain[recipes]'`).

Which transitions a rank draws depends on what it has played: another number of ranks is another training, as good.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hvdtrain.data import Rollouts
from hvdtrain.torch import Recipe, option


class QNetwork(nn.Module):
    """Values of the actions in a state, (B, 4) -> (B, 2), and the earlier network that targets are computed by."""

    def __init__(self, inputs, width, actions):
        super().__init__()
        self.online = self._layers(inputs, width, actions)
        self.target = self._layers(inputs, width, actions).requires_grad_(False)
        self.copy_to_target()

    @staticmethod
    def _layers(inputs, width, actions):
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, actions)
        )

    def copy_to_target(self):
        self.target.load_state_dict(self.online.state_dict())

    def forward(self, states):
        return self.online(states)


class Player:
    """The online network in numpy: for one state at a time several times as fast as torch."""

    def __init__(self, network):
        layers = [layer for layer in network.online if isinstance(layer, nn.Linear)]
        self.layers = [(x.weight.detach().cpu().numpy().T.copy(), x.bias.detach().cpu().numpy().copy()) for x in layers]

    def best_action(self, state):
        for i, (weight, bias) in enumerate(self.layers):
            state = state @ weight + bias
            state = np.maximum(state, 0) if i + 1 < len(self.layers) else state
        return int(state.argmax())


@dataclass(kw_only=True)
class DQN(Recipe):
    """CartPole-v1 by double DQN with n-step returns: the current network makes the experience as training goes."""

    domain = "control"
    best = ("return", "max")

    width: int = option(64, "units of each hidden layer", at_least=1)
    environments: int = option(32, "environments over all ranks, each of which makes one move a step", at_least=1)
    memory: int = option(20_000, "transitions that each rank's replay memory holds", at_least=1)
    n_step: int = option(10, "moves whose rewards a target adds up before it asks the network", at_least=1)
    gamma: float = option(0.995, "discount of later rewards")
    explore: float = option(0.05, "part of random moves at the end of the exploration")
    explore_steps: int = option(800, "steps in which that part falls from 1", at_least=1)
    target_every: int = option(20, "steps after which the target network becomes the online one", at_least=1)
    episodes: int = option(20, "episodes of an evaluation, without random moves", at_least=1)
    goal: float = option(475.0, "mean return of an evaluation at which training ends")
    epochs: int = 20  # of 250 steps
    batch_size: int = 128
    lr: float = 1e-3

    def model(self):
        self.network = QNetwork(4, self.width, 2)
        # What each rank has of its own, and fills again after a resume.
        self.playing, self.memorized, self.player = {}, deque(maxlen=self.memory), (None, None)
        return self.network

    def dataset(self, split):
        if split == "train":
            return Rollouts(self.play, 250 * self.batch_size)
        return Rollouts(self.play_episode, self.episodes)

    def play(self, now, i):
        """Make a move, if example i is that of an environment; return a transition from the memory."""
        if i * self.environments % self.batch_size < self.environments:
            self.move(now, i)
        while not self.memorized:
            self.move(now, i)
        return self.memorized[np.random.randint(len(self.memorized))]

    def move(self, now, i):
        environment, state, moves = self.playing.get(i) or (*self.start_episode(), deque())
        explore = max(self.explore, 1 - (1 - self.explore) * now.step / self.explore_steps)
        action = np.random.randint(2) if np.random.random() < explore else self.find_player(now).best_action(state)
        following, reward, ended, stopped, _ = environment.step(action)
        moves.append((state, action, reward))
        while moves and (len(moves) >= self.n_step or ended or stopped):
            self.memorized.append(self.make_transition(moves, following, ended))
            moves.popleft()
        if ended or stopped:
            following, _ = environment.reset()
        self.playing[i] = environment, following, moves

    def make_transition(self, moves, following, ended, total=0.0):
        """Return a state and an action, what the moves from there earn, the state after them and its value's weight.

        Rewards are multiplied by 1 - gamma, so that values are means of rewards, from 0 to 1: learned much sooner.
        """
        earned = (1 - self.gamma) * sum(self.gamma**k * reward for k, (_, _, reward) in enumerate(moves))
        weight = 0 if ended else self.gamma ** len(moves)
        state, action, _ = moves[0]
        return state, action, np.float32(earned), following, np.float32(weight), np.float32(total)

    def play_episode(self, now, i):
        """Play an episode without random moves; return one of its transitions, with the sum of its rewards."""
        environment, state = self.start_episode()
        moves, total, over = [], 0.0, False
        while not over:
            action = self.find_player(now).best_action(state)
            following, reward, ended, stopped, _ = environment.step(action)
            moves.append(((state, action, reward), following, ended))
            state, total, over = following, total + reward, ended or stopped
        move, following, ended = moves[np.random.randint(len(moves))]
        return self.make_transition([move], following, ended, total)

    def start_episode(self):
        # Not at the top: `hvdtrain launch` reads the recipe too, and needs no environment.
        import gymnasium

        environment = gymnasium.make("CartPole-v1")
        state, _ = environment.reset(seed=np.random.randint(2**31))
        return environment, state

    def find_player(self, now):
        if self.player[0] != now.step:
            self.player = now.step, Player(self.network)
        return self.player[1]

    def optimizer(self, params):
        return torch.optim.Adam(params, lr=self.lr)

    def score(self, model, batch):
        states, actions, earned, following, weights, returns = batch
        if model.training and self.now.step % self.target_every == 0:
            model.copy_to_target()
        with torch.no_grad():
            chosen = model(following).argmax(1, keepdim=True)
            targets = earned + weights * model.target(following).gather(1, chosen)[:, 0]
        values = model(states).gather(1, actions[:, None])[:, 0]
        return {"loss": F.smooth_l1_loss(values, targets, reduction="none"), "return": returns}

    def evaluated(self, model, metrics):
        return metrics["return"] >= self.goal
