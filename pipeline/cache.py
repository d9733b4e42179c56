"""Reading a cache: SQL over everything, tokens by clip."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ..schemas.errors import CacheError, did_you_mean
from ..schemas.masks import ClipMasks
from ..schemas.relevance import Calibration, Rule
from ..schemas.shard import EMBEDDINGS, MASKS, TOKENS, WEBDATASET, frames_product
from ..schemas.tokens import TokenGrid, TrajectoryTokens
from .cache_head import read_info
from .frames import EmbeddedFrames
from .mask_file import MaskFile
from .open_files import OpenFiles
from .queries import add_queries
from .relevance import FrameEncoder, KnownEncoder, check_same_encoder, encoders_of
from .scoring import best_frames, check_where, encoder_name, example_vector, scores_for, text_vectors
from .session import Session
from .snapshots import read_snapshot, take_snapshot
from .storage import Folder
from .token_file import TokenFile, TokenLayout, from_planes
from .trajectory_file import TrajectoryFile
from .views import CLIPS_WITH_VIDEOS

if TYPE_CHECKING:
    from .decoding import TokenDecoder
    from .loader import TokenLoader
    from .selection import Selection

LoadEncoder = Callable[[KnownEncoder], FrameEncoder]  # what made embeddings


def open_cache(uri: str, snapshot: int | None = None, load_encoder: LoadEncoder | None = None) -> "TokenCache":
    """The token cache at a local path or fsspec URL, as it is now or as snapshot number `snapshot` pinned it.

    `load_encoder` is for queries in words. CacheError where there is no cache, or no such snapshot.
    """
    return TokenCache(Folder(uri), snapshot, load_encoder)


class TokenCache:
    """One cache, for reading. Sees what was committed when it was opened, or what a snapshot pinned."""

    def __init__(self, folder: Folder, snapshot: int | None = None, load_encoder: LoadEncoder | None = None) -> None:
        self.folder = folder
        self._load_encoder = load_encoder
        self._encoders: dict[str, FrameEncoder] = {}
        self.info = read_info(folder)
        self.pinned = None if snapshot is None else read_snapshot(folder, snapshot)
        if self.pinned:
            self.info = self.pinned.info
        self._session = Session(folder, self.info, self.pinned)
        self._token_files = OpenFiles(TokenFile, folder)
        self._trajectory_files = OpenFiles(TrajectoryFile, folder)
        self._mask_files = OpenFiles(MaskFile, folder)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the cache anew, at the same snapshot: connections and memory maps do not travel."""
        return open_cache, (self.folder.url, self.pinned.number if self.pinned else None, self._load_encoder)

    def snapshot(self) -> int:
        """Pin what is committed now, and return the snapshot's number; of a cache opened at one, that one's."""
        return self.pinned.number if self.pinned else take_snapshot(self.folder)[0].number

    def sql(self, query: str, parameters: Sequence[Any] = ()) -> pa.Table:
        """The answer of a read-only query as an Arrow table; CacheError says what DuckDB has against it.

        Tables: videos, duplicates, clips, products, shards, failures, files, locations; views: tokens_<product>
        with codes as lists, levels_<product> with those of each level, and tokens, all of them together.
        code_usage('<product>') counts every code of every level, code_statistics('<product>') sums that up; latents
        and trajectories have neither, nor levels_<product>. Of candidate frames: frames, frames_<encoder> with their
        embeddings, queries, query_embeddings, scorers, relevance, relevance_history, labels, policies and verdicts.
        """
        return self._session.sql(query, parameters)

    def clips(self, where: str = "true") -> pa.Table:
        """Clips with uri, caption and metadata of their videos, where an SQL condition holds, by clip_id."""
        return self.sql(f"from {CLIPS_WITH_VIDEOS} where ({where}\n) order by clip_id")

    @property
    def token_products(self) -> list[str]:
        """The products of tokens; CacheError where there are none, or in tars only."""
        products = [product for product, entry in self.info.products.items() if entry.tokenizer]
        if not products and WEBDATASET not in self.info.products:
            raise CacheError(f"{self.folder.url}: it has no tokens: its products are {', '.join(self.info.products)}")
        if not products:
            raise CacheError(
                f"{self.folder.url}: its tokens are in tars only (shards.format=webdataset): read those with the"
                f" webdataset library, or run the recipe with shards.format=both"
            )
        return products

    @property
    def grid_products(self) -> list[str]:
        """Those of them whose tokens lie in grids."""
        products = [product for product, entry in self.info.products.items() if entry.tokenizer]
        return [product for product in products if not self.has_trajectories(product)]

    def has_trajectories(self, product: str) -> bool:
        """Whether the tokens of a product stand for trajectories."""
        return (self.info.products[product].tokenizer or {}).get("kind") == "trajectory"

    def product(self, name: str) -> str:
        """The product called `name` (`dct` or `tokens/dct`); CacheError lists what the cache has."""
        return self._product(name, TOKENS, self.token_products)

    def grid_product(self, name: str) -> str:
        """As `product`, where tokens lie in grids; CacheError where they do not."""
        product = self.product(name)
        if self.has_trajectories(product):
            raise CacheError(f"{product}: a clip has as many tokens as trajectories: read_trajectories gives them")
        return product

    def masks_product(self, name: str) -> str:
        """The product of masks called `name` (`objects` or `masks/objects`); CacheError lists what the cache has."""
        return self._product(name, MASKS, [p for p, entry in self.info.products.items() if entry.segmenter])

    def _product(self, name: str, kind: str, products: Sequence[str]) -> str:
        for product in (name, f"{kind}{name}"):
            if product in products:
                return product
        if name in self.info.products:
            raise CacheError(
                f"{self.folder.url}: {name} is no product of {kind.rstrip('/')}: read gives grids and embeddings,"
                f" read_trajectories tokens of trajectories, read_masks masks"
            )
        known = [product.removeprefix(kind) for product in products]
        raise CacheError(
            f"{self.folder.url}: no product {kind}{name.removeprefix(kind)}{did_you_mean(name, known)};"
            f" there are {', '.join(known) or 'none'}"
        )

    def clip_id(self, prefix: str) -> str:
        """The one clip whose id begins with `prefix`."""
        found = self.sql("select clip_id from clips where starts_with(clip_id, ?) limit 2", [prefix.lower()])
        if found.num_rows == 1:
            return found["clip_id"][0].as_py()
        how_many = "no clip" if not found.num_rows else "more than one clip"
        raise CacheError(
            f'{self.folder.url}: {how_many} begins with {prefix!r}: tokenmill sql CACHE "select clip_id from clips"'
        )

    def read(
        self, product: str, clip_ids: Sequence[str], *, levels: int | None = None, verify: bool = True
    ) -> torch.Tensor:
        """The tokens of `clip_ids`, in their order: codes int32 (N,t,h,w) or latents (N,t,h,w,d).

        Codes that come in levels are (N,t,h,w,L), level after level in memory; where each has a grid of its own, they
        are (N,n), one level after the other. With `levels` they are those of the first few alone, and no other bytes
        are touched.
        Tokens are copied out of the memory-mapped files, checked against their digests on first touch unless
        `verify` is off. CacheError names clips that the product does not have.
        """
        is_embedding = product.startswith(EMBEDDINGS) and product in self.info.products
        product = product if is_embedding else self.grid_product(product)
        if levels is not None:
            self.level_grids(product, levels)
        places = self._locate(product, clip_ids)
        names, rows = places["name"].to_pylist(), places["row_in_file"].to_numpy()
        return self.read_places(names, rows, levels=levels, verify=verify)

    def read_levels(
        self, product: str, clip_ids: Sequence[str], *, levels: int | None = None, verify: bool = True
    ) -> list[torch.Tensor]:
        """The codes int32 (N,t,h,w) of every level, or of the first few, of `clip_ids`, in their order; as `read`."""
        product = self.grid_product(product)
        grids = self.level_grids(product, levels)
        codes = self.read(product, clip_ids, levels=len(grids), verify=verify)
        if codes.ndim == 5:
            return list(codes.unbind(-1))
        parts = codes.split([math.prod(grid) for grid in grids], dim=1)
        return [part.unflatten(1, grid) for part, grid in zip(parts, grids, strict=True)]

    def level_grids(self, product: str, count: int | None = None) -> tuple[tuple[int, ...], ...]:
        """The (t,h,w) grids of all levels of a product (`tokens/<name>`), or of the first `count`.

        CacheError where there are not so many.
        """
        grids = self.info.products[product].levels
        if not grids:
            raise CacheError(f"{product}: its tokens do not come in levels: read it without levels")
        if count is not None and not 1 <= count <= len(grids):
            raise CacheError(f"{product}: {count} levels were asked for: it has 1 to {len(grids)}")
        return grids[:count]

    def read_trajectories(
        self, product: str, clip_ids: Sequence[str], *, verify: bool = True
    ) -> list[TrajectoryTokens]:
        """The tokens of the trajectories of `clip_ids`, in their order; bfloat16 as the int16 of its bits.

        CacheError where the product's tokens lie in grids, and as `read`.
        """
        product = self.product(product)
        if not self.has_trajectories(product):
            raise CacheError(f"{product}: its tokens lie in grids: read gives them")
        places = self._locate(product, clip_ids).to_pylist()
        return [self._trajectory_files.get(one["name"]).read(one["row_in_file"], verify=verify) for one in places]

    def read_masks(self, product: str, clip_ids: Sequence[str]) -> list[ClipMasks]:
        """The masks of `clip_ids`, in their order; CacheError names clips that the product does not have."""
        places = self._locate(self.masks_product(product), clip_ids).to_pylist()
        return [self._mask_files.get(one["name"]).read(one["row_in_file"]) for one in places]

    def read_frames(self, product: str, clip_id: str) -> EmbeddedFrames:
        """The candidate frames of a clip with their embeddings, of a product `frames/<name>`."""
        name = product.removeprefix(frames_product(""))
        query = f"select frame, pts_s, embedding from frames_{name} where clip_id = ? order by frame"
        rows = self.sql(query, [clip_id])
        values_KD = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        return EmbeddedFrames(
            frames=tuple(rows["frame"].to_pylist()),
            pts_s=tuple(rows["pts_s"].to_pylist()),
            embeddings_KD=values_KD.astype("<f2"),
        )

    def grid(self, product: str, clip_id: str) -> TokenGrid:
        """The token grid of one clip, with the number of its frames that are real; bfloat16 comes as float32."""
        tokens = self.read(product, [clip_id])[0]
        values_thw = (tokens.float() if tokens.dtype == torch.bfloat16 else tokens).numpy()
        return TokenGrid(values_thw=values_thw, num_valid=self.num_valid(clip_id))

    def num_valid(self, clip_id: str) -> int:
        """How many frames of a clip are real."""
        return self.answer("select num_valid from clips where clip_id = ?", [clip_id])["num_valid"][0].as_py()

    def read_places(
        self, names: Sequence[str], rows: np.ndarray, *, levels: int | None = None, verify: bool = True
    ) -> torch.Tensor:
        """Tokens by file name and row, in the order given: the quick way when the places are known."""
        if not len(names):
            raise CacheError("no clip was asked for: give at least one clip id")
        by_file: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            by_file.setdefault(name, []).append(i)
        planes: dict[str, np.ndarray] = {}
        layout: TokenLayout | None = None
        for name, positions in by_file.items():
            file = self._token_files.get(name)
            layout = file.layout if levels is None else file.layout.first_levels(levels)
            for column, plane in file.read_planes(rows[positions], layout, verify=verify).items():
                planes.setdefault(column, np.empty((len(names), plane.shape[1]), np.uint8))[positions] = plane
        assert layout is not None
        tokens = torch.from_numpy(from_planes(planes, layout))
        return tokens.view(torch.bfloat16) if layout.dtype == "bfloat16" else tokens

    def loader(self, products: str | Sequence[str], batch_size: int | None = None, **settings: Any) -> "TokenLoader":
        """Batches of one or several products for a trainer; `settings` are those of TokenLoader."""
        from .loader import TokenLoader

        return TokenLoader(self, products, batch_size, **settings)

    def files(self, product: str) -> list[str]:
        """Paths or URLs of the files of a product's current version, for tools that read them by themselves."""
        from .decoding import token_files

        return token_files(self, product)

    def decoder(self, product: str) -> "TokenDecoder":
        """What turns the stored columns of a product into arrays; it can be pickled, and holds no cache."""
        from .decoding import decoder_of

        return decoder_of(self, product)

    def to_ray(self, products: str | Sequence[str], **settings: Any) -> Any:
        """A lazy dataset of Ray Data, a row to a clip; `settings` are those of ray_data.to_ray."""
        from .ray_data import to_ray

        return to_ray(self, products, **settings)

    def encoder(self, name: str) -> FrameEncoder:
        """The encoder called `name` itself, with its texts; CacheError where another one is here."""
        if name not in self._encoders:
            known = encoders_of(self.info)[name]
            if self._load_encoder is None:
                raise CacheError(f"{self.folder.url}: opened without encoders: open it by tokenmill.open_cache")
            encoder = self._load_encoder(known)
            check_same_encoder(encoder, known, self.folder.url)
            self._encoders[name] = encoder
        return self._encoders[name]

    def score(self, queries: str | Sequence[str], scorer: str | None = None, *, where: str = "true") -> list[str]:
        """Score all candidate frames of the clips where an SQL condition holds for texts; returns the queries' ids.

        Scores are added to `relevance`, unless they are there: no video is opened. `scorer` names an encoder, by
        default the only one that takes texts. CacheError where there is none.
        """
        from .score_table import store_scores

        texts = [queries] if isinstance(queries, str) else list(queries)
        name = encoder_name(self, scorer, for_text=True)
        check_where(self, where)
        ids = add_queries(self.folder, texts)
        store_scores(self, name, dict(zip(ids, text_vectors(self, name, texts), strict=True)), where)
        self.refresh()
        return ids

    def search(
        self,
        text: str | None = None,
        *,
        like: str | None = None,
        k: int = 10,
        by: Literal["frame", "clip"] = "frame",
        scorer: str | None = None,
        where: str = "true",
    ) -> pa.Table:
        """The `k` best frames, or clips by their best frame, for a text, or like a clip or its frame ``CLIP:FRAME``.

        video_id, uri, clip_id, frame, pts_s and raw, the best first; nothing is stored.
        """
        if k < 1 or by not in ("frame", "clip"):
            raise CacheError(f"accepted: k from 1 on, by frame or clip; found {k=} {by=}")
        if (text is None) == (like is None):
            raise CacheError("what to search for: give a text, or like=CLIP_ID or CLIP_ID:FRAME")
        name = encoder_name(self, scorer, for_text=text is not None)
        vector_D = example_vector(self, name, like) if like else text_vectors(self, name, [text or ""], store=False)[0]
        return best_frames(self, name, vector_D, k, by=by, where=where)

    def select(
        self,
        query: str,
        budget_tokens: int,
        product: str,
        *,
        scorer: str | None = None,
        where: str = "true",
        **settings: Any,
    ) -> "Selection":
        """The tokens of a product that a budget allows for a query, in the order of time, of the clips where an SQL
        condition holds.

        `scorer` names an encoder, or another scorer whose scores `relevance` has. `settings` are those of
        SelectionSettings: policy, tiers, floor, fill, p_fragment, verify.
        """
        from .selection import SelectionSettings, select_tokens

        scored = scores_for(self, query, scorer, where)
        return select_tokens(self, self.product(product), scored, budget_tokens, SelectionSettings(**settings))

    def fit_calibration(self, scorer: str, rule: Rule = "standardized", source: str | None = None) -> Calibration:
        """The calibration of a scorer that fits the cache's labels best, for the recipe; CacheError without any."""
        from .calibration import fit_calibration

        return fit_calibration(self, scorer, rule, source)

    def refresh(self) -> None:
        """See the scores, labels and policies that were added since the cache was opened."""
        self._session.refresh()

    def _locate(self, product: str, clip_ids: Sequence[str]) -> pa.Table:
        """File and row of every clip asked, in the order asked."""
        asked = pa.table({"position": range(len(clip_ids)), "clip": pa.array(clip_ids, pa.string())})
        places = self.answer(
            """select clip, name, row_in_file from asked a
               left join (from locations where product = ?) l on l.clip_id = try_cast(a.clip as uuid)
               order by position""",
            [product],
            asked=asked,
        )
        missing = places.filter(places["name"].is_null())["clip"].to_pylist()
        if missing:
            raise CacheError(
                f"{self.folder.url}: {product} has no clip {missing[0]!r} ({len(missing)} of {len(clip_ids)} asked are"
                f' missing): tokenmill sql CACHE "select clip_id from clips" lists clips, "from failures" the failed'
            )
        return places

    def answer(
        self, query: str, parameters: Sequence[Any] = (), *, vector_D: np.ndarray | None = None, **tables: pa.Table
    ) -> pa.Table:
        """As `sql`, of a query that may also use the Arrow `tables` given, and views ``scored_<name>`` by a vector."""
        return self._session.answer(query, parameters, vector_D=vector_D, **tables)
