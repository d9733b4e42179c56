"""SQL macros over the codes of a product: how often they are used, what follows what, and what stands still."""

import duckdb

from ..schemas.cache_info import CacheInfo
from .duplicates import create_duplicate_macros

# How often codes are used, from `levels_<name>`. Entropy is in bits for a token; utilisation is the share of the
# codebook that is used at all; perplexity is how many codes used alike would have this entropy.
CODE_MACROS = """
create temp macro code_usage(name) as table
    select level, code, count(*) as uses
    from (select level, unnest(codes) as code from query_table('levels_' || name))
    group by level, code order by level, code;
create temp macro code_statistics(name) as table
    select level, sum(uses)::bigint as num_tokens, count(*) as num_codes,
           count(*) / any_value(p.codebook_size) as utilisation,
           log2(sum(uses)) - sum(uses * log2(uses)) / sum(uses) as entropy_bits,
           2 ** (log2(sum(uses)) - sum(uses * log2(uses)) / sum(uses)) as perplexity
    from (select level, code, count(*) as uses
          from (select level, unnest(codes) as code from query_table('levels_' || name)) group by level, code) u
    join products p on p.product = 'tokens/' || name
    group by level order by level;
"""

# Lists that are unnested beside each other give rows of codes that follow each other; grouping by four columns is a
# tenth of the work of grouping by lists. An end below 0 would count from the end of the list.
NGRAM_MACRO = """
create temp macro code_ngrams(name, n) as table
    select level, [a, b, c, d][:n] as ngram, count(*) as uses
    from (select level, unnest(codes[:num]) as a, unnest(codes[2:num + 1]) as b,
                 unnest(case when n > 2 then codes[3:num + 2] end) as c,
                 unnest(case when n > 3 then codes[4:] end) as d
          from (select level, codes, greatest(0, len(codes) - n + 1) as num from query_table('levels_' || name))
          where if(n in (2, 3, 4), true, error('code_ngrams(name, n): n is 2, 3 or 4, found ' || n)))
    group by level, a, b, c, d order by uses desc, level, ngram;
"""

# A time step of a level has h w tokens: a grid as lists is compared with itself, that much later.
STATIC_MACRO = """
create temp macro static_clips(name) as table
    select clip_id, any_value(num_valid) as num_valid,
           sum(num_same_codes(codes[step + 1:], codes[:len(codes) - step])) / nullif(sum(len(codes) - step), 0) as share
    from (select clip_id, num_valid, codes, coalesce(levels[level], shape) as grid, grid[2] * grid[3] as step
          from query_table('levels_' || name) join products p on p.product = 'tokens/' || name)
    group by clip_id order by share desc nulls last, clip_id;
"""


def create_code_macros(connection: duckdb.DuckDBPyConnection, info: CacheInfo) -> None:
    """Temporary macros over products of codes, by views levels_<name> and tokens_<name> that are there when they are
    used: code_usage(name), code_statistics(name), code_ngrams(name, n), static_clips(name); and those of duplicates.

    code_ngrams: how often n codes follow each other in a level of a clip, row by row (level, ngram, uses).
    static_clips: the share of a clip's tokens that are the one at the same place a time step earlier, over all levels;
    null where grids have one time step. Padding stands still: `num_valid` tells where there is some.
    """
    create_duplicate_macros(connection, info)
    connection.execute(CODE_MACROS + NGRAM_MACRO + STATIC_MACRO)
