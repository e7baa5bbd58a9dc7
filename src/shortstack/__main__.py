from shortstack.cli import main

raise SystemExit(main())
