"""The method: terms, their switches, their weights, the layers they train.

To add a term, write its function in `kdseg.losses` and its record in
`terms.TERMS`; or, without a change to the package, hand a record over as an
extension (`extensions.Extensions`). All else follows from the record: names in
the log, layers trained along, weight, balance, the tables of docs/methods.md.
"""
