"""Codes in compressed rows, and the fast maps between them and a table."""

from fmxnn.sparse.codes import Codes, choose, is_sparse, keep_largest, sum_rows, to_codes, to_csr, to_dense_codes
from fmxnn.sparse.tables import Tables

__all__ = ["Codes", "Tables", "choose", "is_sparse", "keep_largest", "sum_rows", "to_codes", "to_csr", "to_dense_codes"]
