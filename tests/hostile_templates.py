"""Malicious chat templates by the operation that they misuse: each would take all memory, or run for hours."""

HOSTILE = {
    "square": "{% set s = namespace(x=3) %}{% for i in range(60) %}{% set s.x = s.x * s.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "tojson indent": "{{ messages|tojson(indent=500000000) }}",
    "tojson indent str": "{{ messages|tojson(indent='x'*100000000) }}",
    "tojson separators": "{{ (messages*100)|tojson(separators=('x'*99999999, 'y'*99999999)) }}",
    "center": "{{ 'a'|center(3000000000) }}",
    "center const": "{{ 'a'|center(9999999999) }}",
    "indent": "{{ ('\n'*99999)|indent(999999) }}",
    "indent str": "{{ ('a\n'*99999)|indent('x'*999999) }}",
    "wordwrap": "{{ ('a '*99999)|wordwrap(1, wrapstring='x'*999999) }}",
    "batch": "{{ [1]|batch(3000000000, 0)|list }}",
    "slice": "{{ [1]|slice(3000000000)|list }}",
    "replace filter": "{{ ('a'*999999)|replace('a','b'*999999) }}",
    "replace empty": "{{ ('a'*999999)|replace('','b'*999999) }}",
    "replace method": "{{ ('a'*999999).replace('a','b'*999999) }}",
    "join": "{{ range(99999)|join('x'*999999) }}",
    "join method": "{{ ('x'*999999).join(['a']*99999) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent dot": "{{ '%.1000000000f' % 1 }}",
    "percent map": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a':1}) }}",
    "ljust": "{{ 'a'.ljust(3000000000) }}",
    "rjust": "{{ 'a'.rjust(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "expandtabs": "{{ ('\t'*999).expandtabs(9999999) }}",
    "translate": "{{ ('a'*999999).translate({97: 'b'*999999}) }}",
    "range list string": "{% for i in range(9999) %}{{ range(99999)|list|string|length }}{% endfor %}",
    "lists": "{% set s = namespace(l=[]) %}{% for i in range(99999) %}{% set s.l = s.l + ['x' * 99999] %}{% endfor %}",
    "slices kept": "{% set s = namespace(l=[], t='x'*999999) %}{% for i in range(99999) %}"
        "{% set s.l = s.l + [s.t[1:]] %}{% endfor %}",
    "shared repr": "{% set s = namespace(l=[1]) %}{% for i in range(60) %}{% set s.l = [s.l, s.l] %}"
        "{% endfor %}{{ s.l }}",
    "shared compare": "{% set s = namespace(l=[1], m=[1]) %}{% for i in range(60) %}{% set s.l = [s.l, s.l] %}"
        "{% set s.m = [s.m, s.m] %}{% endfor %}{{ s.l == s.m }}",
    "shared hash": "{% set s = namespace(l=(1,)) %}{% for i in range(60) %}{% set s.l = (s.l, s.l) %}"
        "{% endfor %}{{ {s.l: 1} }}",
    "shared tojson": "{% set s = namespace(l={}) %}{% for i in range(60) %}{% set s.l = dict(a=s.l, b=s.l) %}"
        "{% endfor %}{{ s.l|tojson }}",
    "shared batch": "{% set s = namespace(l=[1]) %}{% for i in range(60) %}{% set s.l = (s.l*2)|batch(9)|list %}"
        "{% endfor %}{{ s.l|string }}",
    "shared namespace": "{% set s = namespace(n=namespace()) %}{% for i in range(60) %}"
        "{% set m = namespace(a=s.n, b=s.n) %}{% set s.n = m %}{% endfor %}{{ s.n }}",
    "shared set attr": "{% set s = namespace(n=namespace()) %}{% for i in range(60) %}"
        "{% set m = namespace() %}{% set m.a = s.n %}{% set m.b = s.n %}{% set s.n = m %}{% endfor %}{{ s.n ~ 'x' }}",
    "varargs": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}"
        "{{ varargs }}{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "macro args": "{% macro f(n, a) %}{% if n %}{{ f(n - 1, [a, a]) }}{% else %}{{ a }}{% endif %}"
        "{% endmacro %}{{ f(60, 1) }}",
    "lipsum": "{{ lipsum(n=100000, min=99999, max=999999) }}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}"
        "{% for j in range(9999) %}{{ c.next() }}{% endfor %}{% endfor %}",
    "striptags": "{{ ('<'*999999)|striptags }}",
    "round": "{{ 5|round(-1000000000, 'ceil') }}",
    "round up": "{{ 1.5|round(1000000000, 'floor') }}",
    "int base": "{{ ('f'*9999999)|int(0, 16) * ('f'*9999999)|int(0, 16) }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "sum": "{{ ([[1]*999]*9999)|sum(start=[])|length }}",
    "sum ints": "{{ ([[1]]*99999)|sum(start=[])|length }}",
    "strftime": "{{ strftime_now('%A'*9999999) }}",
    "recursive": "{% for x in [[1]*99]*99 recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}"
        "{% for i in range(99999) %}{% endfor %}{% endif %}{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "select loops": "{% for i in range(99999) if range(9999)|select|list|length %}{% endfor %}",
    "map center": "{{ ['a']|map('center', 3000000000)|list }}",
    "select in": "{{ range(99999)|select('in', range(99999)|list)|list|length }}",
    "reverse": "{% for i in range(99999) %}{{ ('x'*99999)|reverse|length }}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "doubling": "{% set s = namespace(x='x') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "times list": "{{ ([1] * 3000000000)|length }}",
    "times": "{{ 'x' * 10**12 }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "filter block": "{% filter center(3000000000) %}x{% endfilter %}",
    "set filter": "{% set x | center(3000000000) %}a{% endset %}",
    "pprint": "{{ ([1]*99999)|pprint }}",
    "groupby": "{% for i in range(9999) %}{{ (messages*9999)|groupby('role')|length }}{% endfor %}",
    "sort": "{% for i in range(99999) %}{{ range(99999)|sort|length }}{% endfor %}",
    "unique": "{% for i in range(99999) %}{{ range(99999)|unique|list|length }}{% endfor %}",
    "loopvar": "{% for i in range(99999) %}{{ loop.previtem }}{% for j in range(99999) %}"
        "{{ loop.changed(range(9999)|list) }}{% endfor %}{% endfor %}",
    "import": "{% import 'x' as y %}",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "self block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "generation": "{% generation %}{% for i in range(99999) %}{% for i in range(99999) %}"
        "{% endfor %}{% endfor %}{% endgeneration %}",
    "escape": "{% set s = namespace(x='&') %}{% for i in range(60) %}{% set s.x = s.x|forceescape %}"
        "{% endfor %}{{ s.x|length }}",
    "encode": "{{ ('a'*99999).encode().hex().encode().center(3000000000) }}",
    "title": "{% for i in range(99999) %}{{ ('a '*99999).title()|length }}{% endfor %}",
    "blocks kept": "{% set s = namespace(l=[]) %}{% for i in range(99999) %}{% set x %}" + "y" * 50000
        + "{{ i }}{% endset %}{% set s.l = s.l + [x] %}{% endfor %}",
    "nested short": "{% for a in range(9) %}" * 9 + "{% endfor %}" * 9,
}
UNREADABLE = {
    "deep": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "deep list": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "minus": "{{ " + "-" * 50000 + "1 }}", "long number": "{{ " + "9" * 100000 + " }}",
    "sum": "{{ " + "1+" * 20000 + "1 }}", "deep if": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "large": "x" * 600_000, "spaces": "{{" + " " * 400000 + "}}", "braces": "{" * 400000, "lines": "{%" + "\n" * 400000,
}
