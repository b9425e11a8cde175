"""Statistics of tables that lie at several sites: each site answers twice, and the answers add up to the pooled rows'.

`table` reads what a task gives, `site_answers` computes what leaves a site, `pooled` merges the answers exactly.
"""
