# SPDX-License-Identifier: Apache-2.0
"""What an adapter costs and what it keeps: quality, tables, plots, model cards."""
