"""Blocks of keys and values that later requests with the same beginning take instead of computing them.

Only full blocks, found by chained hashes from a root that stands for everything else the numbers depend on: base model,
precision, adapter and the caller's salt. A hash only says where to look: the tokens and the predecessor are compared,
so that equal hashes never share anything. Whoever holds a cached block holds all blocks before it too; therefore the
block that has been idle longest never has a successor, and evicting in that order only ever takes leaves.
"""

from collections.abc import Sequence as Many

from engine.memory.blocks import BlockPool

Tokens = tuple[int, ...]


def chain(key: int, tokens: Tokens) -> int:
    """The hash of a block behind those that `key` stands for."""
    return hash((key, tokens))


class Root:
    """Where texts of one base, precision, adapter and salt begin. It lives as long as a request or a block needs it."""

    __slots__ = ("children", "dropped", "key", "name", "namespaces", "users")

    def __init__(self, name: tuple[str, ...]) -> None:
        self.name = name
        self.key = hash(name)
        self.children = 0
        self.users = 0
        self.namespaces: set[str] = set()
        self.dropped = False


class Node:
    """One cached block: its tokens and the node (or root) before it."""

    __slots__ = ("block", "children", "key", "parent", "root", "tokens")

    def __init__(self, key: int, root: Root, parent: "Node | Root", tokens: Tokens, block: int) -> None:
        self.key, self.root, self.parent, self.tokens, self.block = key, root, parent, tokens, block
        self.children = 0


class PrefixCache:
    """Knows which block holds which text. Referring to blocks is the callers' business, through the pool."""

    def __init__(self, pool: BlockPool, base: str, precision: str) -> None:
        self._pool = pool
        self._origin = (base, precision)
        self._roots: dict[tuple[str, ...], Root] = {}
        self._nodes: dict[int, Node] = {}
        self._by_block: dict[int, Node] = {}
        pool.evicted = self._evicted

    def __len__(self) -> int:
        return len(self._nodes)

    def open(self, adapter: str | None, salt: str, namespace: str) -> Root:
        """The root for a request, who must close it when it ends."""
        name = (*self._origin, "base" if adapter is None else f"adapter {adapter}", salt)
        root = self._roots.get(name)
        if root is None:
            root = self._roots[name] = Root(name)
        root.users += 1
        root.namespaces.add(namespace)
        return root

    def close(self, root: Root) -> None:
        """A request that opened this root has ended."""
        root.users -= 1
        self._tidy(root)

    def find(self, root: Root, tokens: Many[int]) -> list[Node]:
        """Cached blocks that begin these tokens. One token at least is left over, since something must be computed."""
        size = self._pool.block_size
        found: list[Node] = []
        before: Node | Root = root
        for start in range(0, (len(tokens) - 1) // size * size, size):
            piece = tuple(tokens[start : start + size])
            node = self._nodes.get(chain(before.key, piece))
            if node is None or node.parent is not before or node.tokens != piece:
                break
            found.append(node)
            before = node
        return found

    def keys(self, before: Node | Root, tokens: Many[int], start: int) -> list[int]:
        """Hashes of the full blocks from token `start` on, which follow `before`."""
        size, key = self._pool.block_size, before.key
        result = []
        for at in range(start, len(tokens) // size * size, size):
            key = chain(key, tuple(tokens[at : at + size]))
            result.append(key)
        return result

    def add(self, root: Root, before: Node | Root, tokens: Many[int], block: int) -> Node | None:
        """Keep a held, fully computed block behind `before`, which the caller holds too.

        Returns the node of these tokens, which may be an older one with another block; None when it cannot be kept.
        """
        if root.dropped:
            return None
        piece = tuple(tokens)
        key = chain(before.key, piece)
        known = self._nodes.get(key)
        if known is not None:
            return known if known.parent is before and known.tokens == piece else None
        node = self._nodes[key] = self._by_block[block] = Node(key, root, before, piece, block)
        before.children += 1
        self._pool.keep(block)
        return node

    def forget(self, namespace: str) -> None:
        """Drop what is cached under every root that this namespace has used."""
        for root in [root for root in self._roots.values() if namespace in root.namespaces]:
            self.drop(root)

    def drop(self, root: Root) -> None:
        """Forget all blocks of a root; requests that hold some finish with them but add no more."""
        for node in [node for node in self._nodes.values() if node.root is root]:
            del self._nodes[node.key], self._by_block[node.block]
            self._pool.unkeep(node.block)
        root.dropped = True
        root.children = 0
        self._roots.pop(root.name, None)

    def _evicted(self, block: int) -> None:
        node = self._by_block.pop(block)
        assert not node.children, "blocks are evicted from the end of a text"
        del self._nodes[node.key]
        node.parent.children -= 1
        self._tidy(node.root)

    def _tidy(self, root: Root) -> None:
        if not root.users and not root.children and not root.dropped:
            del self._roots[root.name]
