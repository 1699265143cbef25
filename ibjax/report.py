def table(records):
    return "\n".join(f"{r['title']:24s} {r['attack']:8s} eps {r['eps']:8} clean {r['clean_acc']:6.2f} robust {r['robust_acc']:6.2f} n={r['n']} {r['seconds']}s" for r in records)
def write(workdirs, out):
    pass
