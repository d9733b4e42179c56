"""SQL macros over the codes of a product: how often they are used, and what that says."""

import duckdb

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


def create_code_macros(connection: duckdb.DuckDBPyConnection) -> None:
    """Temporary macros code_usage(name) and code_statistics(name), over the views levels_<name>."""
    connection.execute(CODE_MACROS)
