"""Saved queries over a cache: what is often asked, by name. docs/queries.md shows each, filled."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template
from typing import TYPE_CHECKING

import pyarrow as pa

from ..schemas.cache_info import ProductInfo
from ..schemas.errors import CacheError, RecipeError, did_you_mean
from ..schemas.shard import EMBEDDINGS, TOKENS

if TYPE_CHECKING:
    from .cache import TokenCache

Value = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedQuery:
    """What it answers, SQL with $parameters, and the values these have unless others are given.

    ``$product`` is a product of codes and ``$embeddings`` one of clips' embeddings: the cache's only one by default.
    """

    answers: str
    sql: str
    defaults: Mapping[str, Value] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """The names of its parameters, in their order in the text."""
        return Template(self.sql).get_identifiers()


def named_query(cache: "TokenCache", name: str, /, **parameters: Value) -> pa.Table:
    """The answer of a saved query as an Arrow table; errors as `named_sql` and `TokenCache.sql`."""
    return cache.sql(named_sql(cache, name, **parameters))


def named_sql(cache: "TokenCache", name: str, /, **parameters: Value) -> str:
    """The text of a saved query with its parameters filled in.

    RecipeError for unknown names and parameters, and values that are none; CacheError where the cache lacks a product,
    or has several and none was chosen.
    """
    if name not in NAMED_QUERIES:
        raise RecipeError(f"no saved query {name!r}{did_you_mean(name, list(NAMED_QUERIES))}; there are\n{listing()}")
    query = NAMED_QUERIES[name]
    for key in parameters:
        if key not in query.parameters:
            accepted = ", ".join(query.parameters) or "none"
            raise RecipeError(
                f"{name}: no parameter {key!r}{did_you_mean(key, query.parameters)}; accepted: {accepted}"
            )
    filled = {}
    for key in query.parameters:
        if key in query.defaults:
            filled[key] = _literal(f"{name}: {key}", parameters.get(key), query.defaults[key])
        else:
            filled[key] = _product(cache, key, parameters.get(key))
    return Template(query.sql.strip()).substitute(filled)


def listing() -> str:
    """One line for each saved query: its name, what it answers, its parameters."""
    width = max(map(len, NAMED_QUERIES))
    return "\n".join(
        f"  {name:<{width}}  {one.answers} ({', '.join(one.parameters) or 'no parameters'})"
        for name, one in NAMED_QUERIES.items()
    )


def _literal(what: str, value: Value | None, default: Value) -> str:
    """A value of the default's type as SQL has it; texts stand between single quotes."""
    if value is None:
        value = default
    if isinstance(default, str):
        return str(value).replace("'", "''")
    try:
        number = type(default)(value)
        is_exact = isinstance(value, str) or (number == value and not isinstance(value, bool))
        if is_exact and math.isfinite(number):
            return str(number)
    except (ValueError, OverflowError):
        pass
    wanted = "a whole number" if isinstance(default, int) else "a number"
    raise RecipeError(f"{what} is {wanted}, found {value!r}")


def _product(cache: "TokenCache", key: str, value: Value | None) -> str:
    """The name of the product that is meant, without its kind."""
    kind, what = (EMBEDDINGS, "embeddings of clips") if key == "embeddings" else (TOKENS, "codes")
    entries = cache.info.products.items()
    known = [name.removeprefix(kind) for name, entry in entries if name.startswith(kind) and _is_asked(key, entry)]
    asked = str(value).removeprefix(kind) if value is not None else None
    if asked is None and len(known) == 1:
        return known[0]
    if asked in known:
        return asked
    found = f"has no product {asked} of {what}" if asked else f"{len(known)} products are of {what}, one is wanted"
    choose = f": give {key}=NAME, one of {', '.join(known)}" if known else ": a recipe that makes one adds it"
    raise CacheError(f"{cache.folder.url}: {found}{choose}")


def _is_asked(key: str, entry: ProductInfo) -> bool:
    return key == "embeddings" or (entry.tokenizer or {}).get("kind") == "discrete"


NAMED_QUERIES: dict[str, NamedQuery] = {
    "sizes": NamedQuery(
        answers="what is in the cache: its products, and their clips, tokens of a clip, files and bytes",
        sql="""
select p.product, coalesce(p.tokenizer, p.segmenter, p.encoder) as made_by, p.kind, num_clips,
       case p.kind when 'discrete' then list_product(p.shape)::bigint
                   when 'continuous' then list_product(p.shape[:-2])::bigint end as tokens_per_clip,
       num_files, size_bytes, size_bytes / num_clips as bytes_per_clip
from products p
left join (select product, sum(num_clips)::bigint as num_clips from shards group by product) using (product)
left join (select product, count(*) as num_files, sum(size_bytes)::bigint as size_bytes from files group by product)
     using (product)
order by p.product""",
    ),
    "failures": NamedQuery(
        answers="what failed or is quarantined, by step and reason, the most frequent first",
        sql="""
select status, step, reason, count(*) as num_failures, min(uri) as example
from failures group by status, step, reason order by num_failures desc, status, step, reason limit $limit""",
        defaults={"limit": 20},
    ),
    "durations": NamedQuery(
        answers="how many videos of each status there are, their hours, and how long they last",
        sql="""
select status, count(*) as num_videos, sum(duration_s) / 3600 as hours, min(duration_s) as min_s,
       median(duration_s) as median_s, quantile_cont(duration_s, 0.95) as p95_s, max(duration_s) as max_s
from videos group by status order by num_videos desc, status""",
    ),
    "clips_per_video": NamedQuery(
        answers="how many clips and frames of each video are in the cache, those with the most first",
        sql="""
select v.uri, v.duration_s, count(c.clip_id) as num_clips, coalesce(sum(c.num_valid), 0)::bigint as num_frames
from videos v left join clips c using (video_id)
group by v.video_id, v.uri, v.duration_s order by num_clips desc, v.uri limit $limit""",
        defaults={"limit": 20},
    ),
    "hosts": NamedQuery(
        answers="what each host has made, and how fast one of its workers is",
        sql="""
with made as (
    select shard_id, host, max(num_clips) as num_clips,
           any_value(decode_s + segment_s + coalesce(embed_s, 0) + tokenize_s) + sum(write_s) as busy_s
    from shards group by shard_id, host, decode_s, segment_s, embed_s, tokenize_s
)
select host, count(distinct shard_id) as num_shards, sum(num_clips)::bigint as num_clips, sum(busy_s) as busy_s,
       sum(num_clips) / nullif(sum(busy_s), 0) as clips_per_s
from made group by host order by num_clips desc, host""",
    ),
    "usage": NamedQuery(
        answers="which codes are used most",
        sql="""
from code_usage('$product') order by uses desc, level, code limit $limit""",
        defaults={"limit": 20},
    ),
    "statistics": NamedQuery(
        answers="how much of the codebook is used, and how many bits a token holds (entropy), in each level",
        sql="""
from code_statistics('$product')""",
    ),
    "ngrams": NamedQuery(
        answers="which n codes (2, 3 or 4) follow each other most, row by row of the grid",
        sql="""
from code_ngrams('$product', $n) limit $limit""",
        defaults={"n": 2, "limit": 20},
    ),
    "unusual": NamedQuery(
        answers="which clips have the rarest codes: bits of a token by how often codes are used",
        sql="""
with seen as (select level, code, log2(sum(uses) over (partition by level) / uses) as bits from code_usage('$product'))
select clip_id, avg(bits) as bits_per_token
from (select clip_id, level, unnest(codes) as code from levels_$product) join seen using (level, code)
group by clip_id order by bits_per_token desc, clip_id limit $limit""",
        defaults={"limit": 20},
    ),
    "static": NamedQuery(
        answers="in which clips nothing moves: most tokens are the ones before them in time",
        sql="""
select clip_id, v.uri, c.start_s, s.num_valid, share
from static_clips('$product') s join clips c using (clip_id) join videos v using (video_id)
where share >= $min_share order by share desc, clip_id limit $limit""",
        defaults={"min_share": 0.95, "limit": 20},
    ),
    "duplicates": NamedQuery(
        answers="which clips have exactly the same codes",
        sql="""
from duplicate_clips('$product') limit $limit""",
        defaults={"limit": 20},
    ),
    "near_duplicates": NamedQuery(
        answers="which pairs of clips have the same code in most places",
        sql="""
from near_duplicates('$product', $min_share) limit $limit""",
        defaults={"min_share": 0.9, "limit": 20},
    ),
    "similar_sets": NamedQuery(
        answers="which pairs of clips have nearly the same codes, wherever these lie: shifted or timed otherwise",
        sql="""
from similar_code_sets('$product', $min_jaccard) limit $limit""",
        defaults={"min_jaccard": 0.8, "limit": 20},
    ),
    "neighbours": NamedQuery(
        answers="which clips are most like one, by its first digits, in their embeddings",
        sql="""
with asked as (
    select clip_id as asked_id, embedding as asked
    from embeddings_$embeddings where starts_with(clip_id, '$clip') order by clip_id limit 1
)
select clip_id, array_cosine_similarity(embedding, asked) as cosine
from embeddings_$embeddings, asked where clip_id <> asked_id order by cosine desc, clip_id limit $limit""",
        defaults={"clip": "", "limit": 10},
    ),
    "best_frames": NamedQuery(
        answers="which frames matter most to every query that was scored, or to those with a text in them",
        sql="""
select text, scorer, v.uri, clip_id, frame, p
from relevance join queries using (query_id) join videos v using (video_id)
where contains(text, '$text')
qualify row_number() over (partition by query_id, scorer order by p desc, clip_id, frame) <= $limit
order by text, scorer, p desc, clip_id, frame""",
        defaults={"text": "", "limit": 5},
    ),
    "trajectories": NamedQuery(
        answers="which trajectories last longest, over all clips of their video",
        sql="""
select product, v.uri, trajectory_id, t.num_clips, t.duration_s, t.start_s, t.end_s, area
from video_trajectories t join videos v using (video_id)
order by t.duration_s desc, area desc, trajectory_id limit $limit""",
        defaults={"limit": 20},
    ),
    "captions": NamedQuery(
        answers="which clips are of videos with a text in their caption",
        sql="""
select clip_id, v.uri, c.start_s, v.caption
from clips c join videos v using (video_id)
where contains(lower(v.caption), lower('$text')) order by v.uri, c.start_s, clip_id limit $limit""",
        defaults={"text": "", "limit": 20},
    ),
    "split": NamedQuery(
        answers="a split that never changes: so many percent of the videos, and all of their clips, are held out",
        sql="""
select clip_id, video_id, if(md5_number_lower(video_id) % 100 < $percent, 'held out', 'train') as split
from clips order by clip_id""",
        defaults={"percent": 5},
    ),
}
