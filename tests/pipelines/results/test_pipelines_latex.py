import pytest

from pipelines.results import latex


def test_text_is_printed_as_it_is():
    assert latex.escaped("50 % of a_b & c^2 ~ {x} \\ #1 $") == (
        r"50 \% of a\_b \& c\textasciicircum{}2 \textasciitilde{} \{x\} \textbackslash{} \#1 \$"
    )
    assert latex.escaped("91.00 ± 1.41 %") == r"91.00 $\pm$ 1.41 \%"


def test_a_table_is_a_tabular_of_booktabs():
    text = latex.table(["method", "test accuracy"], [["FedAvg", "91 %"], ["A & B", "none"]], "what it is\nand more")
    assert text == (
        "% what it is\n% and more\n% needs \\usepackage{booktabs}\n\\begin{tabular}{lr}\n\\toprule\n"
        "method & test accuracy \\\\\n\\midrule\nFedAvg & 91 \\% \\\\\n"
        "A \\& B & none \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_rows_have_as_many_cells_as_the_header():
    with pytest.raises(ValueError, match="a row has 1 cells and the header 2"):
        latex.table(["a", "b"], [["1"]])
