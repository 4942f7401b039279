"""Every prefix once: sequences that begin alike are merged into a tree, packed into rows, and masked."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.attention.flex_attention import create_block_mask


@dataclass
class Tree:
    """Sequences merged where they begin alike, as one list of tokens in pre-order.

    A dialogue without --think is one sequence, and its tree a chain. With --think every turn is a sequence: the history that
    all later turns share is a trunk, each turn's thinking and reply a branch. Dialogues share the system prompt, and in a
    group the opening or all that was said. Token k is seen by token q exactly where it lies on q's path: k <= q < ends[k].
    So a forward pass computes every prefix once, with gradients as if not.
    """

    ids: list[int]
    positions: list[int]  # depth in the tree: the place in the original sequence
    ends: list[int]  # one past the last token below this one

    def __len__(self):
        return len(self.ids)

    @property
    def trunk(self) -> int:
        """How many tokens come before the first branching."""
        return next((k for k, end in enumerate(self.ends) if end < len(self)), len(self))


def prefix_tree(sequences: list[list[int]]) -> tuple[Tree, list[list[int]]]:
    """(tree, paths): paths[s][c] is the place in the tree of token c of sequence s."""
    tree, paths = Tree([], [], []), [[] for _ in sequences]
    previous, path = [], []
    for s in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[s]
        shared = common_prefix([previous, sequence])
        path = path[:shared] + list(range(len(tree), len(tree) + len(sequence) - shared))
        tree.ids += sequence[shared:]
        tree.positions += range(shared, len(sequence))
        tree.ends += [0] * (len(sequence) - shared)
        for place in path:
            tree.ends[place] = len(tree)
        paths[s], previous = path, sequence
    return tree, paths


def common_prefix(sequences: list[list[int]]) -> int:
    """How many ids all sequences start with: the system prompt, the group's opening. common_prefix([[1, 2], [1, 3]]) -> 1"""
    first, last = min(sequences), max(sequences)
    return next((k for k, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


@dataclass
class Sequences:
    """Token sequences of dialogues, and N tokens in them that a forward pass is to predict."""

    sequences: list[list[int]]
    row_N: torch.Tensor  # sequence of each token
    column_N: torch.Tensor  # its place there; it is predicted at column - 1
    dialogue_N: torch.Tensor

    @cached_property
    def _rows(self) -> dict[int, list[int]]:
        rows = {}
        for dialogue, row in sorted(set(zip(self.dialogue_N.tolist(), self.row_N.tolist()))):
            rows.setdefault(dialogue, []).append(row)
        return rows

    @cached_property
    def sizes(self) -> dict[int, int]:
        """Tokens of each dialogue, its sequences merged."""
        return {dialogue: self.size([dialogue]) for dialogue in self._rows}

    def size(self, dialogues: list[int]) -> int:
        """Tokens of some dialogues, merged where they begin alike."""
        return len(self.merge(tuple(dialogues))[0])

    @cached_property
    def _merged(self) -> dict:
        return {}

    def tokens_of(self, dialogues) -> torch.Tensor:
        """Indices into N of the tokens of some dialogues (n,)."""
        return torch.isin(self.dialogue_N, torch.tensor(dialogues)).nonzero().squeeze(1)

    def merge(self, dialogues: tuple[int, ...]):
        """(tree of these dialogues, place there of the token that predicts each of theirs (n,), indices into N (n,))."""
        if dialogues not in self._merged:
            rows = [row for dialogue in dialogues for row in self._rows[dialogue]]
            tree, paths = prefix_tree([self.sequences[row] for row in rows])
            path_of = dict(zip(rows, paths))
            index_n = self.tokens_of(dialogues)
            pairs = zip(self.row_N[index_n].tolist(), self.column_N[index_n].tolist())
            self._merged[dialogues] = tree, torch.tensor([path_of[row][column - 1] for row, column in pairs]), index_n
        return self._merged[dialogues]

    def lay_out(self, members: list[int]) -> list[list[int]]:
        """The dialogues of each row of a pass with a dense mask, which costs by its width. One that shares most of its tokens with
        its neighbours, as in a group with one history, joins their tree; rows are as wide as the largest tree, short ones share one."""
        trees = []
        for dialogue in members:
            if trees and self.size([*trees[-1], dialogue]) < self.size(trees[-1]) + self.sizes[dialogue] / 2:
                trees[-1].append(dialogue)
            else:
                trees.append([dialogue])
        head = common_prefix([self.merge((dialogue,))[0].ids for dialogue in members])
        rows = pack([self.size(tree) - head for tree in trees])
        return [[dialogue for tree in row for dialogue in trees[tree]] for row in rows]


def pack(sizes: list[int]) -> list[list[int]]:
    """Lay pieces side by side into rows as wide as the largest. pack([5, 3, 2]) -> [[0], [1, 2]]"""
    rows, filled = [], []
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        row = next((row for row, used in enumerate(filled) if used + sizes[piece] <= max(sizes)), len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row].append(piece)
        filled[row] += sizes[piece]
    return rows


def tree_mask(ends_B_T, shared: int, flex: bool):
    """Who sees whom: k <= q < ends[k]; everybody sees the `shared` tokens before. FlexAttention's mask, or (B, 1, T, P + T)."""
    B, T = ends_B_T.shape
    if flex:
        compiled = ends_B_T.device.type == "cuda"
        seen = lambda b, h, q, k: (k <= q) & (q < ends_B_T[b, k])
        return create_block_mask(seen, B, None, T, T, device=ends_B_T.device, _compile=compiled)
    place_T = torch.arange(T, device=ends_B_T.device)
    q_1_T_1, k_1_1_T = place_T[None, :, None], place_T[None, None, :]
    visible_B_T_T = (k_1_1_T <= q_1_T_1) & (q_1_T_1 < ends_B_T[:, None, :])
    return torch.cat([visible_B_T_T.new_ones(B, T, shared), visible_B_T_T], dim=2)[:, None]
